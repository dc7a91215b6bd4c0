//! Text to words, by the patterns that tokenizers have for it.
//!
//! Nearly all of them end in `\s+(?!\S)|\s+`: white space leaves its last character to the word that
//! follows. This is the one thing that keeps them from automata that take linear time, and it is as
//! easily done afterwards: the run is matched as a whole, and cut if something follows.

use regex_automata::meta::{Cache, Regex};
use regex_automata::{Anchored, Input, PatternID};
use serde_json::Value;
use std::ops::Range;

/// The end of a pattern that leaves the last space to the next word.
const LOOKAHEAD: &str = r"|\s+(?!\S)|\s+";

/// GPT-2's pattern, which byte-level tokenizers use unless they bring their own.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// One way to cut text; every piece of it remains.
#[derive(Debug)]
pub(super) enum Split {
    /// At what a pattern matches; its second pattern is the white space of [`LOOKAHEAD`].
    Pattern(Regex),
    /// At digits: each by itself, or runs of them.
    Digits { individual: bool },
}

/// What cutting needs, kept from one text to the next.
#[derive(Default)]
pub(super) struct Scratch {
    /// Of each split that is a pattern.
    caches: Vec<Option<Cache>>,
    words: Vec<Range<usize>>,
    next: Vec<Range<usize>>,
}

impl Split {
    /// The splits of a byte-level pre-tokenizer, if all of them are known.
    pub(super) fn of_byte_level(pre_tokenizer: &Value) -> Option<Vec<Self>> {
        let steps = match pre_tokenizer.get("type")?.as_str()? {
            "Sequence" => pre_tokenizer.get("pretokenizers")?.as_array()?.as_slice(),
            _ => std::slice::from_ref(pre_tokenizer),
        };
        let (bytes, steps) = steps.split_last()?;
        let is_known = is(bytes, "type", "ByteLevel") && is(bytes, "add_prefix_space", false);
        if !is_known {
            return None;
        }
        let mut splits = steps.iter().map(Self::of).collect::<Option<Vec<_>>>()?;
        if is(bytes, "use_regex", true) {
            splits.push(Self::pattern(GPT2)?);
        }
        Some(splits)
    }

    fn of(step: &Value) -> Option<Self> {
        match step.get("type")?.as_str()? {
            "Split" if is(step, "behavior", "Isolated") && is(step, "invert", false) => {
                Self::pattern(step.get("pattern")?.get("Regex")?.as_str()?)
            }
            "Digits" => Some(Self::Digits {
                individual: step.get("individual_digits")?.as_bool()?,
            }),
            _ => None,
        }
    }

    fn pattern(pattern: &str) -> Option<Self> {
        let before = pattern.strip_suffix(LOOKAHEAD);
        let pattern = before.unwrap_or(pattern);
        if !means_the_same(pattern) {
            return None;
        }
        let spaces = before.map(|_| r"\s+");
        let patterns: Vec<&str> = std::iter::once(pattern).chain(spaces).collect();
        Regex::new_many(&patterns).ok().map(Self::Pattern)
    }

    /// The words of a part of a text; nothing if a pattern matches the empty text somewhere, which is
    /// not followed here.
    pub(super) fn words<'s>(
        splits: &[Self],
        text: &str,
        part: Range<usize>,
        scratch: &'s mut Scratch,
    ) -> Option<&'s [Range<usize>]> {
        scratch.caches.resize_with(splits.len(), || None);
        scratch.words.clear();
        scratch.words.push(part);
        for (split, cache) in splits.iter().zip(&mut scratch.caches) {
            scratch.next.clear();
            for word in &scratch.words {
                let base = word.start;
                let push = |piece: Range<usize>| {
                    scratch.next.push(base + piece.start..base + piece.end);
                };
                split.cut(&text[word.clone()], cache, push)?;
            }
            std::mem::swap(&mut scratch.words, &mut scratch.next);
        }
        Some(&scratch.words)
    }

    fn cut(
        &self,
        text: &str,
        cache: &mut Option<Cache>,
        mut push: impl FnMut(Range<usize>),
    ) -> Option<()> {
        match self {
            Self::Pattern(regex) => {
                let cache = cache.get_or_insert_with(|| regex.create_cache());
                by_pattern(regex, cache, text, push)
            }
            Self::Digits { individual } => {
                let mut begin = 0;
                while let Some(first) = text[begin..].chars().next() {
                    let rest = &text[begin..];
                    let is_digit = first.is_numeric();
                    let length = if is_digit && *individual {
                        first.len_utf8()
                    } else {
                        let other = rest.find(|c: char| c.is_numeric() != is_digit);
                        other.unwrap_or(rest.len())
                    };
                    push(begin..begin + length);
                    begin += length;
                }
                Some(())
            }
        }
    }
}

fn is(step: &Value, key: &str, value: impl Into<Value>) -> bool {
    step.get(key) == Some(&value.into())
}

/// What a pattern matches and what lies between, in order; nothing if a match is empty.
fn by_pattern(
    regex: &Regex,
    cache: &mut Cache,
    text: &str,
    mut push: impl FnMut(Range<usize>),
) -> Option<()> {
    let spaces = PatternID::must(1);
    let mut done = 0;
    while done < text.len() {
        // Nearly always something begins right here, and the end of that is all there is to find.
        let input = Input::new(text).range(done..);
        let here = input.clone().anchored(Anchored::Yes);
        let found = regex.search_with(cache, &here);
        let Some(found) = found.or_else(|| regex.search_with(cache, &input)) else {
            break;
        };
        if found.is_empty() {
            return None;
        }
        let mut end = found.end();
        if found.pattern() == spaces && end < text.len() {
            let run = &text[found.range()];
            let last = run.chars().next_back().map_or(0, char::len_utf8);
            // A single space is all there is to match.
            end -= if last < run.len() { last } else { 0 };
        }
        if done < found.start() {
            push(done..found.start());
        }
        push(found.start()..end);
        done = end;
    }
    if done < text.len() {
        push(done..text.len());
    }
    Some(())
}

/// Whether a pattern is none of those that the two engines read in different ways: possessive
/// repetitions, groups other than plain ones, and repetitions without a lower bound.
fn means_the_same(pattern: &str) -> bool {
    let mut rest = pattern;
    let mut depth = 0;
    while let Some(c) = rest.chars().next() {
        if c == '\\' {
            // The braces of a class such as `\\p{L}` repeat nothing.
            let is_class = rest.starts_with(r"\p{") || rest.starts_with(r"\P{");
            let end = if is_class { rest.find('}') } else { Some(1) };
            let end = end.filter(|end| rest.len() > *end);
            let Some(last) =
                end.and_then(|end| rest[end..].chars().next().map(|c| end + c.len_utf8()))
            else {
                return false;
            };
            rest = &rest[last..];
            continue;
        }
        match c {
            '[' => depth += 1,
            ']' if depth > 0 => depth -= 1,
            _ if depth > 0 => {}
            '(' if rest.starts_with("(?")
                && !rest.starts_with("(?:")
                && !rest.starts_with("(?i:") =>
            {
                return false;
            }
            '*' | '+' | '?' | '}' if rest[1..].starts_with('+') => return false,
            '{' if rest[1..].starts_with(',') => return false,
            _ => {}
        }
        rest = &rest[c.len_utf8()..];
    }
    depth == 0
}
