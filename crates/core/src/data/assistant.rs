//! Which tokens of a conversation the assistant wrote.
//!
//! A template with `{% generation %}` tags says it itself. For any other, a turn of the assistant
//! begins where the rendering of what comes before it, with the generation prompt, ends: that is
//! what the model is given when it has to answer. It ends where the rendering that stops after it
//! ends. Both must be beginnings of the whole rendering, or the template rewrites its history, and
//! the model would be trained on a context that it never gets.

#[cfg(test)]
mod tests;

use crate::data::chat_template::Ending;
use crate::data::record::Message;
use crate::data::tokenizer::{Encoded, Tokenizer};
use crate::{Error, Result};
use std::ops::Range;

/// The role whose turns are trained.
const ASSISTANT: &str = "assistant";

/// Which tokens lie in `spans` of the text: for each, from the token of its first byte to the token
/// of its last.
///
/// # Source
/// The assistant masks of transformers' `apply_chat_template`.
#[must_use]
pub fn mask_of_spans(encoded: &Encoded, spans: &[Range<usize>]) -> Vec<bool> {
    let mut mask = vec![false; encoded.ids.len()];
    let mut from = 0;
    for span in spans.iter().filter(|s| !s.is_empty()) {
        let token_at = |byte: usize| {
            let covers = |&(begin, end): &(usize, usize)| begin <= byte && byte < end;
            Some(from + encoded.offsets[from..].iter().position(covers)?)
        };
        let Some(first) = token_at(span.start) else {
            continue;
        };
        let last = token_at(span.end - 1).unwrap_or(mask.len() - 1);
        mask[first..=last.max(first)].fill(true);
        from = first;
    }
    mask
}

/// A conversation whose rendering does not say what the assistant wrote.
pub(super) struct Untagged<'a, R> {
    pub(super) messages: &'a [Message],
    /// The whole conversation, rendered.
    pub(super) text: &'a str,
    /// Its tokens.
    pub(super) encoded: &'a Encoded,
    pub(super) tokenizer: &'a Tokenizer,
    /// Renders the first messages.
    pub(super) render: R,
}

impl<R: Fn(&[Message], Ending) -> Result<String>> Untagged<'_, R> {
    /// The bytes of the text that the assistant wrote, with what ends its turns.
    ///
    /// # Errors
    /// [`Error::Template`] when the template renders a turn differently once others follow.
    pub(super) fn spans(&self) -> Result<Vec<Range<usize>>> {
        let turns = self.messages.iter().enumerate();
        turns
            .filter(|(_, message)| message.role() == ASSISTANT)
            .map(|(i, _)| Ok(self.begin(i)?..self.end(i)?))
            .collect()
    }

    fn begin(&self, i: usize) -> Result<usize> {
        let given = (self.render)(&self.messages[..i], Ending::GenerationPrompt);
        let given = given.map_err(|error| match error {
            Error::Template { message } if i == 0 => Error::Template {
                message: format!(
                    "the conversation begins with the assistant, and the template renders nothing \
                     before it: {message}"
                ),
            },
            other => other,
        })?;
        if self.text.starts_with(&given) {
            return Ok(given.len());
        }
        Err(self.rewritten(i, &given))
    }

    fn end(&self, i: usize) -> Result<usize> {
        if i + 1 == self.messages.len() {
            return Ok(self.text.len());
        }
        let closed = (self.render)(&self.messages[..=i], Ending::Closed)?;
        if self.text.starts_with(&closed) {
            return Ok(closed.len());
        }
        // Some templates end a conversation with a token that a turn in its middle does not have.
        let common = common_prefix(&closed, self.text);
        let ends = self.encoded.offsets.iter().map(|o| o.1);
        let kept = ends.take_while(|end| *end <= common).max().unwrap_or(0);
        if !closed.is_char_boundary(kept) || !self.only_ends(&closed[kept..])? {
            return Err(self.rewritten(i, &closed));
        }
        let tokens = self.encoded.ids.iter().zip(&self.encoded.offsets);
        let mut following = tokens.skip_while(|(_, offsets)| offsets.1 <= kept);
        // A turn in the middle may end with another token instead.
        let last_kept = self.encoded.offsets.iter().rposition(|o| o.1 <= kept);
        let is_ended = last_kept.is_some_and(|last| {
            let trailing = self.encoded.ids[..=last].iter().zip(&self.encoded.offsets);
            trailing
                .rev()
                .find(|(_, o)| !self.text[o.0..o.1].trim().is_empty())
                .is_some_and(|(id, _)| self.tokenizer.is_added(*id))
        });
        match following.next() {
            Some((id, offsets)) if !is_ended && self.tokenizer.is_added(*id) => Ok(offsets.1),
            _ => Ok(kept),
        }
    }

    /// Whether a text is nothing but tokens beyond the vocabulary of text, and white space.
    fn only_ends(&self, text: &str) -> Result<bool> {
        use crate::data::tokenizer::SpecialTokens::Omit;
        let tail = self.tokenizer.encode_with_offsets(text, Omit)?;
        let mut tokens = tail.ids.iter().zip(&tail.offsets);
        Ok(tokens.all(|(id, o)| {
            self.tokenizer.is_added(*id) || text.get(o.0..o.1).is_some_and(|t| t.trim().is_empty())
        }))
    }

    fn rewritten(&self, i: usize, alone: &str) -> Error {
        let at = common_prefix(alone, self.text);
        Error::Template {
            message: format!(
                "the template renders message {i} (counted from 0), or what comes before it, \
                 differently once others follow: `{}` becomes `{}`, so training on it would teach \
                 answers to a context the model never gets; use a template that keeps its history, \
                 one with {{% generation %}} tags, or rows of `prompt` and `completion`",
                excerpt(alone[at..].chars()),
                excerpt(self.text[at..].chars())
            ),
        }
    }
}

/// The bytes that two texts begin with in common, up to the end of a character.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.char_indices().zip(b.chars());
    same.take_while(|((_, x), y)| x == y)
        .last()
        .map_or(0, |((at, c), _)| at + c.len_utf8())
}

/// Up to 24 characters of a text, without line breaks.
pub(super) fn excerpt(text: impl Iterator<Item = char>) -> String {
    text.take(24).flat_map(char::escape_debug).collect()
}
