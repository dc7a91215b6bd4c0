//! BPE word by word, and words remembered.
//!
//! The tokens of most texts are those of their words, one by one, and words recur. So a text is cut
//! into words here, the model is asked once for each of them, and what it says is kept. Everything
//! that decides which tokens a word has stays the model's; how a text is cut is written anew for the
//! kinds of tokenizer below, and [`Words::of`] gives nothing for any other.
//!
//! - byte-level BPE: words by patterns and digits, no normaliser, or NFC on text that is NFC already;
//! - SentencePiece's BPE, as Llama 2, Mistral and Gemma have it, which knows no words: `spaces` says where
//!   its texts can be cut.
//!
//! Offsets are those of the original text, in bytes, to whole characters.

mod added;
mod cache;
mod form;
mod spaces;
mod split;
#[cfg(test)]
mod tests;

use super::Encoded;
use added::AddedTokens;
use cache::{Token, WordCache};
use form::Form;
use split::{Scratch, Split};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use tokenizers::Model;

/// Caches to choose from; one per thread of a large machine.
const CACHES: usize = 64;

type Result<T> = std::result::Result<T, tokenizers::Error>;

/// How a tokenizer cuts texts, and the words it has met.
pub(super) struct Words {
    added: AddedTokens,
    form: Form,
    /// Special tokens before and after a text.
    front: Vec<u32>,
    back: Vec<u32>,
    /// Whether the post-processor leaves offsets as they are.
    keeps_offsets: bool,
    caches: Box<[Mutex<Memory>]>,
}

/// What one thread works with.
#[derive(Default)]
struct Memory {
    cache: WordCache,
    scratch: Scratch,
}

/// A text being encoded.
struct Output {
    encoded: Encoded,
    with_offsets: bool,
}

impl Words {
    /// The words of a tokenizer, if it is of a kind that has them.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let mut words = Self {
            added: AddedTokens::of(tokenizer)?,
            form: Form::of(tokenizer)?,
            front: Vec::new(),
            back: Vec::new(),
            keeps_offsets: form::keeps_offsets(tokenizer)?,
            caches: (0..CACHES).map(|_| Mutex::default()).collect(),
        };
        if words.added.any_normalized() && !words.form.leaves_text() {
            return None;
        }
        // What the post-processor adds does not depend on the text, or this is not for us.
        for (i, probe) in ["a", "b a"].into_iter().enumerate() {
            let ids = words.encode(tokenizer, probe, false, false).ok()??.ids;
            let plain = tokenizer.encode_fast(probe, false).ok()?;
            let full = tokenizer.encode_fast(probe, true).ok()?;
            if i == 0 {
                let at = full.get_ids().windows(ids.len()).position(|w| w == ids)?;
                words.front = full.get_ids()[..at].to_vec();
                words.back = full.get_ids()[at + ids.len()..].to_vec();
            }
            let whole = [&words.front[..], &ids, &words.back].concat();
            if plain.get_ids() != ids || full.get_ids() != whole {
                return None;
            }
        }
        Some(words)
    }

    /// The tokens of a text, and where they come from if that is asked for; nothing for a text that
    /// has to go the long way.
    ///
    /// # Errors
    /// What the model says.
    pub(super) fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        special: bool,
        with_offsets: bool,
    ) -> Result<Option<Encoded>> {
        if (with_offsets && !self.keeps_offsets) || !self.form.takes(text) {
            return Ok(None);
        }
        let index = rayon::current_thread_index().map_or(0, |i| i + 1) % CACHES;
        let memory = self.caches[index].lock();
        let mut memory = memory.unwrap_or_else(PoisonError::into_inner);
        let mut output = Output {
            encoded: Encoded::default(),
            with_offsets,
        };
        output.encoded.ids.reserve(text.len() / 3);
        let (front, back) = if special {
            (&self.front[..], &self.back[..])
        } else {
            (&[][..], &[][..])
        };
        front.iter().for_each(|id| output.push(*id, (0, 0)));
        let mut is_known = true;
        self.added.split(text, |range, added| {
            match added {
                Some(id) => output.push(id, (range.start, range.end)),
                None if is_known => {
                    is_known = self.segment(tokenizer, text, range, &mut memory, &mut output)?;
                }
                None => {}
            }
            Ok(())
        })?;
        back.iter().for_each(|id| output.push(*id, (0, 0)));
        Ok(is_known.then_some(output.encoded))
    }

    /// Encodes text between added tokens; whether it could.
    fn segment(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        range: Range<usize>,
        memory: &mut Memory,
        output: &mut Output,
    ) -> Result<bool> {
        let model = tokenizer.get_model();
        match &self.form {
            Form::Bytes { splits, .. } => {
                let words = Split::words(splits, text, range, &mut memory.scratch);
                let Some(words) = words else {
                    return Ok(false);
                };
                for word in words {
                    let tokens = memory.cache.tokens(&text[word.clone()], |word| {
                        form::tokens_of_bytes(word, |mapped| model.tokenize(mapped))
                    })?;
                    let Some(tokens) = tokens else {
                        return Ok(false);
                    };
                    output.extend(tokens, |begin, end| {
                        char_range(text, word.start + begin, word.start + end)
                    });
                }
            }
            Form::Text(spaces) => {
                let part = &text[range.clone()];
                let (marked, origin) = spaces.mark(part, range.start == 0, output.with_offsets);
                for word in spaces.words(&marked) {
                    let tokens = memory.cache.tokens(&marked[word.clone()], |word| {
                        spaces::tokens_of_text(word, |word| model.tokenize(word))
                    })?;
                    let Some(tokens) = tokens else {
                        return Ok(false);
                    };
                    output.extend(tokens, |begin, end| {
                        let first = origin[word.start + begin];
                        let last = origin[word.start + end - 1];
                        (range.start + first.0, range.start + last.1)
                    });
                }
            }
        }
        Ok(true)
    }
}

impl Output {
    fn push(&mut self, id: u32, offsets: (usize, usize)) {
        self.encoded.ids.push(id);
        if self.with_offsets {
            self.encoded.offsets.push(offsets);
        }
    }

    fn extend(&mut self, tokens: &[Token], place: impl Fn(usize, usize) -> (usize, usize)) {
        self.encoded.ids.extend(tokens.iter().map(|t| t.id));
        if self.with_offsets {
            let places = tokens
                .iter()
                .map(|t| place(t.begin as usize, t.end as usize));
            self.encoded.offsets.extend(places);
        }
    }
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Words")
            .field("form", &self.form)
            .finish_non_exhaustive()
    }
}

/// The characters that bytes lie in.
fn char_range(text: &str, mut begin: usize, mut end: usize) -> (usize, usize) {
    while !text.is_char_boundary(begin) {
        begin -= 1;
    }
    while !text.is_char_boundary(end) {
        end += 1;
    }
    (begin, end)
}
