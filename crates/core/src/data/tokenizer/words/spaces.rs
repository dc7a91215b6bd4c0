//! Tokenizers that take a text as one word, as SentencePiece does, with `▁` for its spaces.
//!
//! BPE joins what stands side by side. Where the characters on both sides of a place stand side by side
//! in no token of the vocabulary, no merge ever crosses that place, so the text can be cut there.

use super::Result;
use super::cache::Token;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::ops::Range;
use tokenizers::ModelWrapper;

/// SentencePiece's sign for a space.
const MARK: char = '\u{2581}';

/// From this many bytes on a word ends wherever it can; before, only before a space, because shorter
/// pieces are found faster, but there are more of them.
const LONG: usize = 16;

/// What a text is turned into, and where it can be cut.
pub(super) struct Spaces {
    marks: Marks,
    /// Characters that are tokens.
    known: HashSet<char, foldhash::fast::RandomState>,
    /// Characters side by side in a token.
    pairs: HashSet<(char, char), foldhash::fast::RandomState>,
}

/// Where marks come to stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marks {
    Nowhere,
    /// In place of spaces.
    Spaces,
    /// And before every text.
    SpacesAndBefore,
    /// And before what does not begin with one already.
    SpacesAndMissing,
    /// And before the very first text, if it does not begin with one already.
    SpacesAndMissingFirst,
}

impl Spaces {
    pub(super) fn of(
        normalizer: &Value,
        pre_tokenizer: &Value,
        model: &ModelWrapper,
    ) -> Option<Self> {
        let marks = Marks::of(normalizer, pre_tokenizer)?;
        let ModelWrapper::BPE(bpe) = model else {
            return None;
        };
        if bpe.ignore_merges
            || bpe.continuing_subword_prefix.is_some()
            || bpe.end_of_word_suffix.is_some()
        {
            return None;
        }
        let mut spaces = Self {
            marks,
            known: HashSet::default(),
            pairs: HashSet::default(),
        };
        let unknown = bpe.unk_token.as_deref();
        for token in bpe.get_vocab().keys() {
            // Tokens that stand for other characters than their own must not be merged with any.
            let has_byte = token.contains("<0x") && token.len() > "<0x00>".len();
            let has_unknown = unknown.is_some_and(|u| token != u && token.contains(u));
            if has_byte || has_unknown {
                return None;
            }
            let mut chars = token.chars();
            let mut left = chars.next()?;
            if chars.as_str().is_empty() {
                spaces.known.insert(left);
            }
            for right in chars {
                spaces.pairs.insert((left, right));
                left = right;
            }
        }
        Some(spaces)
    }

    pub(super) fn leave_text(&self) -> bool {
        self.marks == Marks::Nowhere
    }

    /// A part of a text, which `is_first` if it begins it, with its marks, and the bytes of the part that each of
    /// its bytes comes from, if asked for.
    pub(super) fn mark(
        &self,
        part: &str,
        is_first: bool,
        with_origin: bool,
    ) -> (String, Vec<(usize, usize)>) {
        let mut marked = String::with_capacity(part.len() * 3 / 2 + 3);
        let mut origin = Vec::new();
        let starts_marked = part.starts_with([' ', MARK]);
        let is_led = match self.marks {
            Marks::Nowhere | Marks::Spaces => false,
            Marks::SpacesAndBefore => true,
            Marks::SpacesAndMissing => !starts_marked,
            Marks::SpacesAndMissingFirst => is_first && !starts_marked,
        };
        if let Some(first) = part.chars().next().filter(|_| is_led) {
            marked.push(MARK);
            origin.extend([(0, first.len_utf8()); MARK.len_utf8()]);
        }
        for (at, c) in part.char_indices() {
            let is_space = c == ' ' && self.marks != Marks::Nowhere;
            let written = if is_space { MARK } else { c };
            marked.push(written);
            if with_origin {
                let from = (at, at + c.len_utf8());
                origin.extend(std::iter::repeat_n(from, written.len_utf8()));
            }
        }
        (marked, origin)
    }

    /// Pieces of marked text that merges do not leave.
    pub(super) fn words(&self, marked: &str) -> impl Iterator<Item = Range<usize>> {
        let mut begin = 0;
        std::iter::from_fn(move || {
            let rest = &marked[begin..];
            let mut chars = rest.char_indices();
            let mut left = chars.next()?.1;
            let end = chars.find_map(|(at, right)| {
                let is_wanted = at >= LONG || (right == MARK && left != MARK);
                let is_end = is_wanted && self.parts(left, right);
                left = right;
                is_end.then_some(at)
            });
            let word = begin..begin + end.unwrap_or(rest.len());
            begin = word.end;
            Some(word)
        })
    }

    /// Whether nothing joins two characters. What is not known may be fused with its like before it.
    fn parts(&self, left: char, right: char) -> bool {
        self.known.contains(&right) && !self.pairs.contains(&(left, right))
    }
}

impl Marks {
    fn of(normalizer: &Value, pre_tokenizer: &Value) -> Option<Self> {
        let prepend = json!({"type": "Prepend", "prepend": MARK});
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": MARK});
        let both = json!({"type": "Sequence", "normalizers": [prepend, replace]});
        // Finds nothing once spaces are replaced.
        let idle = json!({"type": "Split", "pattern": {"String": " "},
                          "behavior": "MergedWithPrevious", "invert": false});
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": false});
        if normalizer.is_null() {
            return match pre_tokenizer {
                Value::Null => Some(Self::Nowhere),
                step if *step == metaspace("never") => Some(Self::Spaces),
                step if *step == metaspace("always") => Some(Self::SpacesAndMissing),
                step if *step == metaspace("first") => Some(Self::SpacesAndMissingFirst),
                _ => None,
            };
        }
        if *pre_tokenizer != Value::Null && *pre_tokenizer != idle {
            return None;
        }
        match normalizer {
            steps if *steps == both => Some(Self::SpacesAndBefore),
            step if *step == replace => Some(Self::Spaces),
            _ => None,
        }
    }
}

impl std::fmt::Debug for Spaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spaces")
            .field("marks", &self.marks)
            .finish_non_exhaustive()
    }
}

/// The tokens of a word as the model gives them.
pub(super) fn tokens_of_text(
    word: &str,
    tokenize: impl FnOnce(&str) -> Result<Vec<tokenizers::Token>>,
) -> Result<Option<Vec<Token>>> {
    let place = |token: tokenizers::Token| {
        let (begin, end) = token.offsets;
        (begin < end && end <= word.len()).then_some(Token {
            id: token.id,
            begin: begin as u32,
            end: end as u32,
        })
    };
    Ok(tokenize(word)?.into_iter().map(place).collect())
}
