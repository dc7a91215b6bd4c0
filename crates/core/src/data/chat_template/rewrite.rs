//! What is changed in the source of a template before it is compiled.
//!
//! The engine has no custom tags, so a generation tag becomes a self-contained block that prints a
//! marker. It stays a block tag, so that the whitespace around it is trimmed as the original's
//! would be. And what is assigned to an attribute of a namespace goes through the filter
//! [`CHECK_FILTER`]: only there can a value come to hold itself, which no printing survives.

use super::generation::{BEGIN, END};

/// The filter that values assigned to an attribute pass.
pub(super) const CHECK_FILTER: &str = "_assignable";

/// The rewritten source, and whether it had a generation tag.
pub(super) fn rewrite_tags(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(at) = rest.find("{%") {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some(tag) = Tag::parse(rest) else {
            out.push_str("{%");
            rest = &rest[2..];
            continue;
        };
        let Tag {
            left, right, inner, ..
        } = tag;
        let marker = match inner.trim() {
            "generation" => Some(BEGIN),
            "endgeneration" => Some(END),
            _ => None,
        };
        if let Some(marker) = marker {
            out.push_str(&format!(
                "{{%{left} if true %}}{{{{ '{marker}' }}}}{{% endif {right}%}}"
            ));
            found |= marker == BEGIN;
        } else if let Some((target, value)) = attribute_assignment(inner) {
            out.push_str(&format!(
                "{{%{left}{target}=({value})|{CHECK_FILTER} {right}%}}"
            ));
        } else {
            out.push_str(&rest[..rest.len() - tag.after.len()]);
        }
        rest = tag.after;
    }
    out.push_str(rest);
    (out, found)
}

/// A block tag, its whitespace signs, and what follows it.
struct Tag<'a> {
    left: &'a str,
    right: &'a str,
    inner: &'a str,
    after: &'a str,
}

impl<'a> Tag<'a> {
    /// The tag at the start of `text`.
    fn parse(text: &'a str) -> Option<Self> {
        let body = text.strip_prefix("{%")?;
        let end = unquoted(body, |rest| rest.starts_with("%}"))?;
        let (inner, after) = (&body[..end], &body[end + 2..]);
        let (left, inner) = match inner.as_bytes().first() {
            Some(b'-' | b'+') => inner.split_at(1),
            _ => ("", inner),
        };
        let (inner, right) = match inner.as_bytes().last() {
            Some(b'-' | b'+') => inner.split_at(inner.len() - 1),
            _ => (inner, ""),
        };
        Some(Self {
            left,
            right,
            inner,
            after,
        })
    }
}

/// The target (with `set`) and the value of `set a.b = value`.
fn attribute_assignment(inner: &str) -> Option<(&str, &str)> {
    let name = inner.trim_start().strip_prefix("set")?;
    if !name.starts_with(char::is_whitespace) {
        return None;
    }
    let at = unquoted(inner, |rest| rest.starts_with('='))?;
    let (target, value) = (&inner[..at], &inner[at + 1..]);
    (target.contains('.') && !value.trim().is_empty()).then_some((target, value))
}

/// The first place outside string literals where `matches` holds for the rest of the text.
fn unquoted(text: &str, matches: impl Fn(&str) -> bool) -> Option<usize> {
    let mut quote = None;
    let mut escaped = false;
    for (i, c) in text.char_indices() {
        match quote {
            None if matches(&text[i..]) => return Some(i),
            None if c == '\'' || c == '"' => quote = Some(c),
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_rewritten_with_their_whitespace_signs() {
        let (rewritten, found) =
            rewrite_tags("a {%- generation -%} b {% endgeneration %}{% if x %}");
        assert!(found);
        assert_eq!(
            rewritten,
            format!(
                "a {{%- if true %}}{{{{ '{BEGIN}' }}}}{{% endif -%}} b \
                 {{% if true %}}{{{{ '{END}' }}}}{{% endif %}}{{% if x %}}"
            )
        );
    }

    #[test]
    fn values_assigned_to_attributes_are_checked_and_all_else_is_kept() {
        assert_eq!(
            rewrite_tags("{%- set ns.x = '%}' if a == 'b=' else [1] -%}").0,
            "{%- set ns.x =( '%}' if a == 'b=' else [1] )|_assignable -%}"
        );
        for kept in [
            "{% for m in messages %}{{ m.generation }}{% endfor %}",
            "{% set x = a.b %}{% set y %}{% endset %}{% if ns.x == 1 %}",
            "{% set x = 'it\\'s %} set a.b = 1' %}{% unclosed 'x",
        ] {
            assert_eq!(rewrite_tags(kept), (kept.to_owned(), false));
        }
    }
}
