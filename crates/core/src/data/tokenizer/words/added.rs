//! Tokens beside the vocabulary of text, which are found before anything is cut into words.

use aho_corasick::{AhoCorasick, MatchKind};
use std::ops::Range;
use tokenizers::AddedToken;

/// Two passes, as the library has them: tokens that match the text itself, then, between those, the
/// ones that match normalised text.
pub(super) struct AddedTokens {
    plain: Option<Finder>,
    normalized: Option<Finder>,
}

struct Finder {
    automaton: AhoCorasick,
    tokens: Vec<(u32, AddedToken)>,
}

impl AddedTokens {
    /// Those of a tokenizer, unless some must be whole words.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let tokens = tokenizer.get_added_tokens_decoder();
        if tokens.values().any(|t| t.single_word) {
            return None;
        }
        let (normalized, plain): (Vec<_>, Vec<_>) =
            tokens.into_iter().partition(|(_, t)| t.normalized);
        Some(Self {
            plain: Finder::of(plain)?,
            normalized: Finder::of(normalized)?,
        })
    }

    pub(super) fn any_normalized(&self) -> bool {
        self.normalized.is_some()
    }

    /// Calls `each` with every piece of a text in order, and the id of those that are added tokens.
    pub(super) fn split(
        &self,
        text: &str,
        mut each: impl FnMut(Range<usize>, Option<u32>) -> super::Result<()>,
    ) -> super::Result<()> {
        Finder::pieces(
            self.plain.as_ref(),
            text,
            0..text.len(),
            &mut |range, id| {
                if id.is_some() {
                    return each(range, id);
                }
                Finder::pieces(self.normalized.as_ref(), text, range, &mut each)
            },
        )
    }
}

impl Finder {
    /// Nothing (of nothing) when there is nothing to find; nothing at all when it cannot be built.
    #[expect(
        clippy::option_option,
        reason = "no tokens is not the same as no automaton"
    )]
    fn of(mut tokens: Vec<(u32, AddedToken)>) -> Option<Option<Self>> {
        if tokens.is_empty() {
            return Some(None);
        }
        tokens.sort_unstable_by_key(|(id, _)| *id);
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(_, token)| token.content.as_bytes()))
            .ok()?;
        Some(Some(Self { automaton, tokens }))
    }

    fn pieces(
        finder: Option<&Self>,
        text: &str,
        range: Range<usize>,
        each: &mut impl FnMut(Range<usize>, Option<u32>) -> super::Result<()>,
    ) -> super::Result<()> {
        let (slice, base) = (&text[range.clone()], range.start);
        let mut done = 0;
        for found in finder.iter().flat_map(|f| f.automaton.find_iter(slice)) {
            let Some((id, token)) = finder.and_then(|f| f.tokens.get(found.pattern().as_usize()))
            else {
                continue;
            };
            let (mut begin, mut end) = (found.start(), found.end());
            if token.lstrip {
                begin = slice[..begin].trim_end().len().max(done);
            }
            if token.rstrip {
                end = slice.len() - slice[end..].trim_start().len();
            }
            if done < begin {
                each(base + done..base + begin, None)?;
            }
            each(base + begin..base + end, Some(*id))?;
            done = end;
        }
        if done < slice.len() {
            each(base + done..range.end, None)?;
        }
        Ok(())
    }
}
