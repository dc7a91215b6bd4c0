//! `{% generation %}` tags: which part of a rendered conversation the assistant wrote.
//!
//! The tags print markers (see `rewrite`), which are taken out of the rendering again. The markers
//! are Unicode noncharacters, which no text is meant to hold.

use std::ops::Range;

pub(super) const BEGIN: char = '\u{fdd0}';
pub(super) const END: char = '\u{fdd1}';

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
    fn spans_are_bytes_of_the_text_without_markers() {
        let (text, spans) =
            strip_markers(&format!("é{BEGIN}ab{END}c{BEGIN}{END}")).expect("the markers pair up");
        assert_eq!((text.as_str(), spans), ("éabc", vec![2..4, 5..5]));
        assert!(strip_markers(&BEGIN.to_string()).is_err());
        assert!(strip_markers(&END.to_string()).is_err());
    }
}
