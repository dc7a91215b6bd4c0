//! Words and their tokens.

use super::Result;
use std::collections::HashMap;
use std::ops::Range;

/// Words that are kept at most; with their tokens some 5 MB. Then all are forgotten.
const MAX_WORDS: usize = 1 << 16;

/// Longer words are not kept: they hardly recur.
const MAX_BYTES: usize = 64;

/// A token of a word and the bytes of the word it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) id: u32,
    pub(super) begin: u32,
    pub(super) end: u32,
}

/// The tokens of words met before.
#[derive(Default)]
pub(super) struct WordCache {
    spans: HashMap<Box<str>, Range<u32>, foldhash::fast::RandomState>,
    tokens: Vec<Token>,
    /// The tokens of the last word that was too long to keep.
    long: Vec<Token>,
}

impl WordCache {
    /// The tokens of a word, which `make` gives the first time; nothing if it does not know them.
    pub(super) fn tokens(
        &mut self,
        word: &str,
        make: impl FnOnce(&str) -> Result<Option<Vec<Token>>>,
    ) -> Result<Option<&[Token]>> {
        if let Some(span) = self.spans.get(word) {
            return Ok(Some(&self.tokens[span.start as usize..span.end as usize]));
        }
        let Some(tokens) = make(word)? else {
            return Ok(None);
        };
        if word.len() > MAX_BYTES {
            self.long = tokens;
            return Ok(Some(&self.long));
        }
        if self.spans.len() >= MAX_WORDS {
            self.spans.clear();
            self.tokens.clear();
        }
        let begin = self.tokens.len();
        self.tokens.extend_from_slice(&tokens);
        let span = begin as u32..self.tokens.len() as u32;
        self.spans.insert(word.into(), span);
        Ok(Some(&self.tokens[begin..]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32) -> Token {
        Token {
            id,
            begin: 0,
            end: 1,
        }
    }

    #[test]
    fn a_word_is_made_once_and_the_number_of_words_is_bounded() {
        let mut cache = WordCache::default();
        let mut made = 0;
        for round in 0..2 {
            for i in 0..MAX_WORDS as u32 / 2 {
                let tokens = cache.tokens(&i.to_string(), |_| {
                    made += 1;
                    Ok(Some(vec![token(i)]))
                });
                let tokens = tokens.expect("nothing fails");
                assert_eq!(tokens, Some(&[token(i)][..]), "round {round}");
            }
        }
        assert_eq!(made, MAX_WORDS / 2);
        for i in 0..3 * MAX_WORDS as u32 {
            let tokens = cache.tokens(&format!("x{i}"), |_| Ok(Some(vec![token(i)])));
            assert_eq!(tokens.expect("nothing fails"), Some(&[token(i)][..]));
        }
        assert!(cache.spans.len() <= MAX_WORDS && cache.tokens.len() <= MAX_WORDS);
        let long = "x".repeat(MAX_BYTES + 1);
        let tokens = cache.tokens(&long, |_| Ok(Some(vec![token(7)])));
        assert_eq!(tokens.expect("nothing fails"), Some(&[token(7)][..]));
        assert!(!cache.spans.contains_key(long.as_str()));
    }
}
