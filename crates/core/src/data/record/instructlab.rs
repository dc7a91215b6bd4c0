//! Rows as InstructLab's training library has them.

use super::{Message, TrainedTurns, list};
use crate::data::jsonl::json_kind;
use serde_json::{Map, Value};

/// The role of a message whose content is a conversation, written out.
const PRETRAINING: &str = "pretraining";
/// Who speaks in it; what the system says is left out.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// How a conversation was written out: what is around a role, and what ends an answer.
struct Form {
    open: &'static str,
    close: &'static str,
    end: &'static str,
}

/// The chat templates of Granite 7B and of Granite 3.
const FORMS: [Form; 2] = [
    Form {
        open: "<|",
        close: "|>",
        end: "<|endoftext|>",
    },
    Form {
        open: "<|start_of_role|>",
        close: "<|end_of_role|>",
        end: "<|end_of_text|>",
    },
];

impl Form {
    fn tag(&self, role: &str) -> String {
        format!("{}{role}{}", self.open, self.close)
    }

    /// The turns of a text.
    fn turns(&self, text: &str) -> Vec<Message> {
        let mut tags: Vec<(usize, usize, &str)> = Vec::new();
        for role in ROLES {
            let tag = self.tag(role);
            tags.extend((text.match_indices(&tag)).map(|(at, _)| (at, at + tag.len(), role)));
        }
        tags.sort_unstable();
        let ends = tags.iter().skip(1).map(|tag| tag.0).chain([text.len()]);
        let turn = |(&(_, begin, role), end): (&(usize, usize, &str), usize)| {
            let said = &text[begin..end];
            let said = said.strip_prefix('\n').unwrap_or(said);
            let said = said.split(self.end).next().unwrap_or_default();
            (role != "system" && !said.is_empty()).then(|| Message::new(role, said))
        };
        tags.iter().zip(ends).filter_map(turn).collect()
    }
}

/// Puts the turns that a `pretraining` message holds in its place; whether there was one.
///
/// # Errors
/// A `pretraining` message without turns.
///
/// # Source
/// `ensure_dataset_is_compatible_with_legacy_format` of InstructLab's training library, which ends what
/// someone says at the first `<`; here it ends where the next one speaks.
pub(super) fn unroll(column: &str, messages: &mut Vec<Message>) -> Result<bool, String> {
    if messages.iter().all(|message| message.role() != PRETRAINING) {
        return Ok(false);
    }
    let mut unrolled = Vec::new();
    for (i, message) in std::mem::take(messages).into_iter().enumerate() {
        if message.role() != PRETRAINING {
            unrolled.push(message);
            continue;
        }
        let text = message.content().and_then(Value::as_str);
        let turns = text.and_then(|text| {
            let turns = FORMS.iter().map(|form| form.turns(text));
            turns.into_iter().find(|turns| !turns.is_empty())
        });
        unrolled.extend(turns.ok_or_else(|| {
            let tags: Vec<String> = FORMS.iter().map(|form| form.tag("user")).collect();
            format!(
                "`{column}[{i}]` has the role `{PRETRAINING}` and no turns as text in its content; expected \
                 {} before what the user says, and likewise for the assistant, or a row of `document`",
                list(&tags.iter().map(String::as_str).collect::<Vec<_>>())
            )
        })?);
    }
    *messages = unrolled;
    Ok(true)
}

/// Which turns `unmask` has trained: all but the system's, or the assistant's.
pub(super) fn trained_turns(row: &Map<String, Value>) -> Result<Option<TrainedTurns>, String> {
    match row.get("unmask") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(true)) => Ok(Some(TrainedTurns::AllButSystem)),
        Some(Value::Bool(false)) => Ok(Some(TrainedTurns::Assistant)),
        Some(other) => Err(format!(
            "`unmask` must be true or false, found {}",
            json_kind(other)
        )),
    }
}

#[cfg(test)]
mod tests {
    use crate::data::record::{Record, TrainedTurns};
    use serde_json::{Value, json};

    /// Who says what.
    type Said = Vec<(String, Value)>;

    fn read(row: &Value) -> Result<(Said, Option<TrainedTurns>), String> {
        let row = row.as_object().expect("a row is an object");
        match Record::from_row(row, "text")? {
            Record::Messages { messages, inputs } => {
                let said = messages.iter().map(|m| {
                    let content = m.content().cloned().unwrap_or_default();
                    (m.role().to_owned(), content)
                });
                Ok((said.collect(), inputs.trained))
            }
            other => panic!("{other:?}"),
        }
    }

    fn said(turns: &[(&str, &str)]) -> Said {
        let turns = turns.iter();
        turns.map(|(r, c)| ((*r).to_owned(), json!(c))).collect()
    }

    #[test]
    fn a_pretraining_message_becomes_its_turns_and_all_of_them_are_trained() {
        let granite_7b =
            "<|system|>\nBe kind.\n<|user|>\nq < r\n<|assistant|>\na\nb<|endoftext|>\n";
        let granite_3 = "<|start_of_role|>user<|end_of_role|>q<|end_of_text|>\n\
                         <|start_of_role|>assistant<|end_of_role|>\na<|end_of_text|>\n";
        for (text, expected) in [
            (
                granite_7b,
                said(&[("system", "s"), ("user", "q < r\n"), ("assistant", "a\nb")]),
            ),
            (
                granite_3,
                said(&[("system", "s"), ("user", "q"), ("assistant", "a")]),
            ),
        ] {
            let row = json!({"unmask": false, "messages": [
                {"role": "system", "content": "s"}, {"role": "pretraining", "content": text}]});
            let trained = Some(TrainedTurns::AllButSystem);
            assert_eq!(read(&row), Ok((expected, trained)));
        }
    }

    #[test]
    fn a_pretraining_message_without_turns_is_explained() {
        for content in [
            json!("Water boils."),
            json!(["a"]),
            json!("<|system|>\nonly"),
        ] {
            let row = json!({"messages": [{"role": "pretraining", "content": content}]});
            let message = read(&row).expect_err("it has no turns");
            for part in ["`messages[0]`", "`<|user|>`", "`document`"] {
                assert!(message.contains(part), "{message} lacks {part}");
            }
        }
    }

    #[test]
    fn unmask_says_whose_turns_are_trained() {
        let row = |unmask: Value| json!({"messages": [{"role": "user", "content": "q"}], "unmask": unmask});
        for (unmask, expected) in [
            (json!(null), None),
            (json!(false), Some(TrainedTurns::Assistant)),
            (json!(true), Some(TrainedTurns::AllButSystem)),
        ] {
            assert_eq!(read(&row(unmask)).map(|(_, trained)| trained), Ok(expected));
        }
        let message = read(&row(json!(1))).expect_err("it is a number");
        assert!(message.contains("`unmask` must be true or"), "{message}");
    }
}
