//! `{% generation %}` tags: which part of a rendered conversation the assistant wrote.
//!
//! The template engine has no custom tags, so each tag is rewritten into a self-contained block
//! that prints a marker. It stays a block tag, so that the whitespace around it is trimmed as the
//! original's would be. The markers are Unicode noncharacters, which no valid text holds.

use std::ops::Range;

pub(super) const BEGIN: char = '\u{fdd0}';
pub(super) const END: char = '\u{fdd1}';

/// The template with every generation tag rewritten, and whether there was one.
pub(super) fn rewrite_tags(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(at) = rest.find("{%") {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some((tag, after)) = parse_tag(rest) {
            let Tag {
                left,
                right,
                marker,
            } = tag;
            out.push_str(&format!(
                "{{%{left} if true %}}{{{{ '{marker}' }}}}{{% endif {right}%}}"
            ));
            found |= marker == BEGIN;
            rest = after;
        } else {
            out.push_str("{%");
            rest = &rest[2..];
        }
    }
    out.push_str(rest);
    (out, found)
}

struct Tag<'a> {
    left: &'a str,
    right: &'a str,
    marker: char,
}

/// A generation tag at the start of `text`, and what follows it.
fn parse_tag(text: &str) -> Option<(Tag<'_>, &str)> {
    let inner = text.strip_prefix("{%")?;
    let end = inner.find("%}")?;
    let (inner, after) = (&inner[..end], &inner[end + 2..]);
    let (left, inner) = match inner.as_bytes().first() {
        Some(b'-' | b'+') => inner.split_at(1),
        _ => ("", inner),
    };
    let (inner, right) = match inner.as_bytes().last() {
        Some(b'-' | b'+') => inner.split_at(inner.len() - 1),
        _ => (inner, ""),
    };
    let marker = match inner.trim() {
        "generation" => BEGIN,
        "endgeneration" => END,
        _ => return None,
    };
    Some((
        Tag {
            left,
            right,
            marker,
        },
        after,
    ))
}

/// Takes the markers out of a rendering: the text, and the byte spans between them.
///
/// # Errors
/// What is wrong, when the markers do not pair up.
pub(super) fn strip_markers(rendered: &str) -> Result<(String, Vec<Range<usize>>), String> {
    let mut text = String::with_capacity(rendered.len());
    let mut spans = Vec::new();
    let mut open = None;
    for c in rendered.chars() {
        match (c, open) {
            (BEGIN, None) => open = Some(text.len()),
            (END, Some(start)) => {
                spans.push(start..text.len());
                open = None;
            }
            (BEGIN, Some(_)) => return Err("a generation block inside another".into()),
            (END, None) => return Err("`endgeneration` without `generation`".into()),
            _ => text.push(c),
        }
    }
    match open {
        None => Ok((text, spans)),
        Some(_) => Err("a generation block that is not closed".into()),
    }
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
        let plain = "{% for m in messages %}{{ m.generation }}{% endfor %}";
        assert_eq!(rewrite_tags(plain), (plain.to_owned(), false));
    }

    #[test]
    fn spans_are_bytes_of_the_text_without_markers() {
        let (text, spans) =
            strip_markers(&format!("é{BEGIN}ab{END}c{BEGIN}{END}")).expect("the markers pair up");
        assert_eq!((text.as_str(), spans), ("éabc", vec![2..4, 5..5]));
        assert!(strip_markers(&BEGIN.to_string()).is_err());
        assert!(strip_markers(&END.to_string()).is_err());
    }
}
