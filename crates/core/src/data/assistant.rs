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
use crate::data::roles::ROLES;
use crate::data::tokenizer::{Encoded, SpecialTokens, Tokenizer};
use crate::{Error, Result};
use std::ops::Range;

/// The role whose turns are trained.
const ASSISTANT: &str = "assistant";

/// What someone is made to say to see what a template writes around it: a character for private use.
const PROBE: &str = "\u{f0f0a}";

/// What can be done where turns cannot be told apart.
const INSTEAD: &str = "use a template that keeps its history, one with {% generation %} tags, or rows of \
                       `prompt` and `completion`";

/// Which tokens lie in `spans` of the text: for each, from the token of its first byte to the token
/// of its last. A last character that takes several tokens has all of them; one that has none of its own, because
/// the tokenizer's normaliser joins it with another or drops it, ends at the last token that reaches into the span.
///
/// # Source
/// The assistant masks of transformers' `apply_chat_template`. Before 5.24 it left all but the first token of such
/// a character out; from then on it also takes a token beside the span that shares its place with one inside,
/// such as a line break behind a SentencePiece space, which this does not.
#[must_use]
pub fn mask_of_spans(encoded: &Encoded, spans: &[Range<usize>]) -> Vec<bool> {
    let offsets = &encoded.offsets;
    let mut mask = vec![false; offsets.len()];
    let mut from = 0;
    for span in spans.iter().filter(|s| !s.is_empty()) {
        let token_at = |byte: usize| {
            let covers = |&(begin, end): &(usize, usize)| begin <= byte && byte < end;
            Some(from + offsets[from..].iter().position(covers)?)
        };
        let reaches_into =
            |&(begin, end): &(usize, usize)| begin < end && begin < span.end && span.start < end;
        let first_inside = || Some(from + offsets[from..].iter().position(reaches_into)?);
        let Some(first) = token_at(span.start).or_else(first_inside) else {
            continue;
        };
        let last_inside = || offsets.iter().rposition(reaches_into);
        let Some(mut last) = token_at(span.end - 1).or_else(last_inside) else {
            continue;
        };
        let (begin, end) = offsets[last];
        while end - begin > 1 && offsets.get(last + 1) == Some(&(begin, end)) {
            last += 1;
        }
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
            .filter(|(i, message)| {
                message.role() == ASSISTANT || self.is_written_as_the_assistant(*i)
            })
            .map(|(i, _)| {
                let begin = self.begin(i)?;
                let is_last = i + 1 == self.messages.len();
                let end = if is_last { Self::last_end } else { Self::end };
                Ok(begin..end(self, i, begin)?)
            })
            .collect()
    }

    /// Whether the template has another name for the assistant, and message `i` has it.
    fn is_written_as_the_assistant(&self, i: usize) -> bool {
        if ROLES.contains(&self.messages[i].role()) {
            return false;
        }
        let mut messages = self.messages.to_vec();
        messages[i] = messages[i].with_role(ASSISTANT);
        (self.render)(&messages, Ending::Closed).is_ok_and(|text| text == self.text)
    }

    fn begin(&self, i: usize) -> Result<usize> {
        let before = &self.messages[..i];
        let given = (self.render)(before, Ending::GenerationPrompt);
        let given = given.map_err(|error| match error {
            Error::Template { message } if i == 0 => Error::Template {
                message: format!(
                    "the conversation begins with the assistant, and the template renders nothing \
                     before it: {message}"
                ),
            },
            other => other,
        })?;
        if !self.text.starts_with(&given) {
            return Err(self.rewritten(i, &given));
        }
        let closed = (self.render)(before, Ending::Closed)?;
        match closed.starts_with(&given) {
            true => self.behind_header(i, given.len()),
            false => Ok(given.len()),
        }
    }

    /// Where an answer begins that no generation prompt opens: behind what the template writes before any
    /// answer there, beyond `given` bytes.
    fn behind_header(&self, i: usize, given: usize) -> Result<usize> {
        let header = self.header(i, ASSISTANT, given)?;
        // A model that is asked writes white space itself.
        if header.as_ref().is_some_and(|h| h.trim().is_empty()) {
            return Ok(given);
        }
        let of_user = self.header(i, "user", given).ok().flatten();
        if let (Some(header), Some(of_user)) = (header, of_user)
            && self.text[given..].starts_with(&header)
            // More tokens than before what a user says may be part of the answer, as empty thoughts are.
            && self.added_tokens(&header)? <= self.added_tokens(&of_user)?
        {
            return Ok(given + header.len());
        }
        Err(Error::Template {
            message: format!(
                "the template ignores `add_generation_prompt`, and it cannot be told how much of what it writes \
                 before message {i} (counted from 0) is the assistant's; {INSTEAD}"
            ),
        })
    }

    /// What the template writes before what `role` says instead of message `i`, beyond `given` bytes.
    fn header(&self, i: usize, role: &str, given: usize) -> Result<Option<String>> {
        let said = Message::new(role, PROBE);
        let rendered = [&self.messages[..i], &[said]].concat();
        let rendered = (self.render)(&rendered, Ending::Closed)?;
        let behind = rendered.strip_prefix(&self.text[..given]);
        let header = behind.and_then(|text| Some(&text[..text.find(PROBE)?]));
        Ok(header.map(str::to_owned))
    }

    /// How many tokens of a text are beyond the vocabulary of text.
    fn added_tokens(&self, text: &str) -> Result<usize> {
        let ids = self.tokenizer.encode(text, SpecialTokens::Omit)?;
        let added = ids.iter().filter(|id| self.tokenizer.is_added(**id));
        Ok(added.count())
    }

    /// Where a turn in the middle ends.
    fn end(&self, i: usize, begin: usize) -> Result<usize> {
        let closed = (self.render)(&self.messages[..=i], Ending::Closed)?;
        if self.text.starts_with(&closed) {
            return Ok(closed.len());
        }
        // Some templates end a conversation with a token that a turn in its middle does not have.
        let kept = self.in_common(&closed);
        let tail = &closed[kept..];
        let Some(ends) = self.end_tokens(tail)? else {
            return match self.is_said_in(i, [&self.text[begin..kept.max(begin)], tail]) {
                [true, false] => Ok(kept),
                _ => Err(self.rewritten(i, &closed)),
            };
        };
        // Of a turn that says nothing, an end is all there is: more than one token is something else.
        if kept <= begin && ends > 1 {
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

    /// Where the last turn ends: with the text, unless the template writes something behind it that it does
    /// not write when the conversation goes on.
    fn last_end(&self, i: usize, begin: usize) -> Result<usize> {
        let all = self.text.len();
        let goes_on = [self.messages, &[Message::new("user", PROBE)]].concat();
        // A template that refuses to go on has nothing to compare with.
        let Ok(longer) = (self.render)(&goes_on, Ending::Closed) else {
            return Ok(all);
        };
        let kept = self.in_common(&longer);
        let tail = &self.text[kept..];
        if longer.starts_with(self.text) || self.end_tokens(tail)?.is_some() {
            return Ok(all);
        }
        let parts = [&self.text[begin..kept.max(begin)], tail];
        match self.is_said_in(i, parts) {
            [true, false] => return Ok(kept),
            [true, true] => return Err(appended(i, tail)),
            [false, _] => {}
        }
        // The template writes a last turn otherwise. It ends as others do, or there is no telling how.
        let behind = |text: &str| {
            let said = self.said(i)?;
            let at = text.rfind(said)?;
            Some(text[at + said.len()..].to_owned())
        };
        let (Some(here), Some(there)) = (behind(self.text), behind(&longer)) else {
            return Ok(all);
        };
        match there.starts_with(&here) || self.end_tokens(&here)?.is_some() {
            true => Ok(all),
            false => Err(appended(i, &here)),
        }
    }

    /// The bytes that the text and another rendering begin with in common, up to the end of a token.
    fn in_common(&self, other: &str) -> usize {
        let common = common_prefix(other, self.text);
        let ends = self.encoded.offsets.iter().map(|o| o.1);
        let ends = ends.take_while(|end| *end <= common);
        ends.filter(|end| self.text.is_char_boundary(*end))
            .max()
            .unwrap_or(0)
    }

    /// The text of a message that nothing but its text is of.
    fn said(&self, i: usize) -> Option<&str> {
        let message = &self.messages[i];
        let calls = message.fields().get("tool_calls");
        let calls = calls.is_some_and(|calls| calls.as_array().is_none_or(|c| !c.is_empty()));
        let said = message.content()?.as_str()?.trim();
        (!calls && !said.is_empty()).then_some(said)
    }

    /// Which of two parts of a rendering hold all that a message says.
    fn is_said_in(&self, i: usize, parts: [&str; 2]) -> [bool; 2] {
        let said = self.said(i);
        parts.map(|part| said.is_some_and(|said| part.contains(said)))
    }

    /// How many tokens a text is, if all of them are beyond the vocabulary of text, white space aside.
    fn end_tokens(&self, text: &str) -> Result<Option<usize>> {
        let tail = (self.tokenizer).encode_with_offsets(text, SpecialTokens::Omit)?;
        let is_space = |o: &(usize, usize)| text.get(o.0..o.1).is_some_and(|t| t.trim().is_empty());
        let tokens = tail.ids.iter().zip(&tail.offsets);
        let mut others = tokens.filter(|(_, o)| !is_space(o)).map(|(id, _)| id);
        let count = others.clone().count();
        Ok(others
            .all(|id| self.tokenizer.is_added(*id))
            .then_some(count))
    }

    fn rewritten(&self, i: usize, alone: &str) -> Error {
        let at = common_prefix(alone, self.text);
        Error::Template {
            message: format!(
                "the template renders message {i} (counted from 0), or what comes before it, \
                 differently once others follow: `{}` becomes `{}`, so training on it would teach \
                 answers to a context the model never gets; {INSTEAD}",
                excerpt(alone[at..].chars()),
                excerpt(self.text[at..].chars())
            ),
        }
    }
}

/// The error of a template that writes `tail` behind a last turn alone.
fn appended(i: usize, tail: &str) -> Error {
    Error::Template {
        message: format!(
            "behind what message {i} (counted from 0) says the template writes `{}`, which it does not write when \
             the conversation goes on, so it cannot be told whether the assistant wrote it; {INSTEAD}",
            excerpt(tail.chars())
        ),
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
