//! What is trained of a conversation that says so itself, as InstructLab's rows do.
//!
//! Of an answer: what the assistant wrote, to the token that ends it. Of anyone else: what the message
//! says, without what the template puts around it. It is found by rendering the conversation once more,
//! with a mark before and behind what each message says.

use crate::data::record::{Message, TrainedTurns};
use crate::{Error, Result};
use serde_json::Value;
use std::ops::Range;

/// Before and behind what is said: characters for private use, which no text means anything by.
const MARKS: [char; 2] = ['\u{f0f0a}', '\u{f0f0b}'];

/// The bytes of `text`, a rendering of `messages`, that are trained, given those the assistant wrote.
///
/// # Errors
/// [`Error::Template`] when the template does not write what others say as it is.
///
/// # Source
/// `unmask_messages` of InstructLab's training library, which puts marks into the tokens instead, where
/// they part words.
pub(super) fn trained_spans(
    turns: TrainedTurns,
    mut assistant: Vec<Range<usize>>,
    messages: &[Message],
    (text, eos): (&str, Option<&str>),
    render: impl Fn(&[Message]) -> Result<String>,
) -> Result<Vec<Range<usize>>> {
    if let Some(eos) = eos.filter(|eos| !eos.is_empty()) {
        for span in &mut assistant {
            if let Some(at) = text[span.clone()].rfind(eos) {
                span.end = span.start + at + eos.len();
            }
        }
    }
    if turns == TrainedTurns::AllButSystem {
        assistant.extend(said_by_others(messages, text, render)?);
        assistant.sort_by_key(|span| span.start);
    }
    Ok(assistant)
}

/// The bytes of what users, tools and whoever else is neither assistant nor system say.
fn said_by_others(
    messages: &[Message],
    text: &str,
    render: impl Fn(&[Message]) -> Result<String>,
) -> Result<Vec<Range<usize>>> {
    // Most templates write what is said as it is, and the others take away the spaces around it.
    let as_it_is: fn(&str) -> &str = |content| content;
    for said in [as_it_is, str::trim] {
        let (marked, wanted) = mark_others(messages, said);
        if wanted == 0 {
            return Ok(Vec::new());
        }
        let (plain, spans) = without_marks(&render(&marked)?);
        if plain == text && spans.len() == wanted {
            return Ok(spans);
        }
    }
    Err(Error::Template {
        message: "`unmask` is true, and the template does not write what each message says once, as it is \
                  and in one piece, so it cannot be told from what is around it; use rows of `prompt` and \
                  `completion`, or `unmask: false`"
            .into(),
    })
}

/// Messages with marks around what others than the assistant and the system say, and how many those are.
fn mark_others(messages: &[Message], said: fn(&str) -> &str) -> (Vec<Message>, usize) {
    let (mut marked, mut count) = (messages.to_vec(), 0);
    for message in &mut marked {
        let Some(Value::String(content)) = message.content() else {
            continue;
        };
        let said = said(content);
        if said.is_empty() || ["assistant", "system"].contains(&message.role()) {
            continue;
        }
        let [begin, end] = MARKS;
        let text = content.replacen(said, &format!("{begin}{said}{end}"), 1);
        message.set_content(text);
        count += 1;
    }
    (marked, count)
}

/// A text without marks, and the bytes that were between them.
fn without_marks(marked: &str) -> (String, Vec<Range<usize>>) {
    let mut plain = String::with_capacity(marked.len());
    let (mut spans, mut begin) = (Vec::new(), None);
    for c in marked.chars() {
        if c == MARKS[0] {
            begin = Some(plain.len());
        } else if c == MARKS[1] {
            spans.extend(begin.take().map(|begin| begin..plain.len()));
        } else {
            plain.push(c);
        }
    }
    (plain, spans)
}
