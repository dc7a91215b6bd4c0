//! Rows of formats other than `messages`, `prompt` with `completion`, and text.

use super::{Record, TemplateInputs, instructlab, list};
use crate::data::batch::IGNORE_INDEX;
use crate::data::jsonl::json_kind;
use serde_json::{Map, Value};

/// ShareGPT's names of who speaks, and the role that templates know each by.
const SPEAKERS: [(&str, &str); 6] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bard", "assistant"),
    ("bing", "assistant"),
    ("observation", "tool"),
];

/// A list of `{"from": ..., "value": ...}` as messages; messages with a `role` stay as they are.
///
/// # Source
/// `maybe_convert_to_chatml` of TRL, which leaves ShareGPT's own names of speakers as roles: no chat
/// template knows them, so here they become the roles they stand for.
pub(super) fn conversations(value: &Value) -> Result<Value, String> {
    let Value::Array(turns) = value else {
        return Ok(value.clone());
    };
    let convert = |(i, turn): (usize, &Value)| {
        let Value::Object(fields) = turn else {
            return Ok(turn.clone());
        };
        if fields.contains_key("role") {
            return Ok(turn.clone());
        }
        match (fields.get("from"), fields.get("value")) {
            (Some(Value::String(from)), Some(content)) => {
                let mut message = Map::new();
                let role = SPEAKERS.iter().find(|(speaker, _)| speaker == from);
                let role = role.map_or(from.as_str(), |(_, role)| role);
                message.insert("role".into(), role.into());
                message.insert("content".into(), content.clone());
                let others = fields
                    .iter()
                    .filter(|(name, _)| !["from", "value"].contains(&name.as_str()));
                message.extend(others.map(|(name, value)| (name.clone(), value.clone())));
                Ok(Value::Object(message))
            }
            _ => {
                let found: Vec<&str> = fields.keys().map(String::as_str).collect();
                Err(format!(
                    "`conversations[{i}]` must have `from` as a string and `value`, found {}",
                    list(&found)
                ))
            }
        }
    };
    turns.iter().enumerate().map(convert).collect()
}

/// `instruction`, `input` and `output` as a prompt and its completion.
///
/// # Source
/// The prompts of Taori et al.: "Stanford Alpaca" (2023).
pub(super) fn alpaca(row: &Map<String, Value>) -> Result<Record, String> {
    let text = |name: &str| match row.get(name) {
        Some(Value::String(text)) => Ok(text.as_str()),
        None | Some(Value::Null) => Ok(""),
        Some(other) => Err(format!(
            "`{name}` must be a string, found {}",
            json_kind(other)
        )),
    };
    let (instruction, input, output) = (text("instruction")?, text("input")?, text("output")?);
    let prompt = if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately \
             completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides \
             further context. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    };
    Ok(Record::PromptCompletion {
        prompt,
        completion: output.to_owned(),
    })
}

/// `input_ids`, with `labels`, or with masks of 0 and 1 of what is trained, or trained as a whole: a record for
/// each document. Tokens that `attention_mask` leaves out are padding, and belong to none.
///
/// # Source
/// The columns of TRL's `SFTTrainer`; `seq_lengths` are those of its packing, `position_ids` and
/// `attention_mask` those that Transformers' models are called with.
pub(super) fn tokens(row: &Map<String, Value>, input_ids: &Value) -> Result<Vec<Record>, String> {
    let input_ids: Vec<u32> = integers("input_ids", input_ids, 0)?;
    let aligned = |name: &str, length: usize| match length == input_ids.len() {
        true => Ok(()),
        false => Err(format!(
            "`{name}` has {length} entries and `input_ids` has {}; they must be as many",
            input_ids.len()
        )),
    };
    let column = |name: &str| row.get(name).filter(|value| !value.is_null());
    let mut labels: Vec<i32> = match column("labels") {
        Some(labels) => integers("labels", labels, i64::from(IGNORE_INDEX))?,
        None => input_ids.iter().map(|&id| id as i32).collect(),
    };
    aligned("labels", labels.len())?;
    if let Some(bad) = labels.iter().find(|&&l| l < 0 && l != IGNORE_INDEX) {
        return Err(format!(
            "`labels` holds {bad}; expected token ids, or {IGNORE_INDEX} for what is not trained"
        ));
    }
    let mask = |name: &str| -> Result<Option<Vec<bool>>, String> {
        let Some(values) = column(name) else {
            return Ok(None);
        };
        let values = bits(name, values)?;
        aligned(name, values.len()).map(|()| Some(values))
    };
    // Labels that are given say it already.
    let masks: &[&str] = match column("labels") {
        Some(_) => &[],
        None => &[super::COMPLETION_MASK, "assistant_masks"],
    };
    for name in masks {
        let trained = mask(name)?;
        let labels = labels.iter_mut().zip(trained.iter().flatten());
        for (label, _) in labels.filter(|(_, trained)| !**trained) {
            *label = IGNORE_INDEX;
        }
    }
    let attention = mask("attention_mask")?;
    let is_token = |i: usize| attention.as_ref().is_none_or(|mask| mask[i]);
    let ends = match (column("seq_lengths"), column("position_ids")) {
        (Some(lengths), _) => ends_of_lengths(lengths, input_ids.len())?,
        (None, Some(positions)) => {
            let positions: Vec<u32> = integers("position_ids", positions, 0)?;
            aligned("position_ids", positions.len())?;
            ends_of_positions(&positions, is_token)?
        }
        (None, None) => vec![input_ids.len()],
    };
    let mut first = 0;
    let document = |end| {
        let kept = (std::mem::replace(&mut first, end)..end).filter(|i| is_token(*i));
        let (input_ids, labels) = kept.map(|i| (input_ids[i], labels[i])).unzip();
        Record::Tokens { input_ids, labels }
    };
    Ok(ends.into_iter().map(document).collect())
}

/// Where the documents of a row of `total` tokens end, by how long each is.
fn ends_of_lengths(lengths: &Value, total: usize) -> Result<Vec<usize>, String> {
    let lengths: Vec<u32> = integers("seq_lengths", lengths, 1)?;
    let mut end = 0;
    let ends: Vec<usize> = (lengths.iter())
        .map(|&length| {
            end += length as usize;
            end
        })
        .collect();
    match end == total && !ends.is_empty() {
        true => Ok(ends),
        false => Err(format!(
            "`seq_lengths` are {end} tokens together and `input_ids` has {total}; they must be as many"
        )),
    }
}

/// The same by positions, which start again at 0 with each document. Those of padding are nothing.
fn ends_of_positions(
    positions: &[u32],
    is_token: impl Fn(usize) -> bool,
) -> Result<Vec<usize>, String> {
    let mut ends = Vec::new();
    let mut next = 0;
    for (i, &position) in positions.iter().enumerate().filter(|(i, _)| is_token(*i)) {
        if position == 0 && next > 0 {
            ends.push(i);
        } else if position != next {
            let or = if next > 0 {
                ", or 0 where a document begins"
            } else {
                ""
            };
            return Err(format!(
                "`position_ids[{i}]` is {position}; expected {next}{or}"
            ));
        }
        next = position + 1;
    }
    ends.push(positions.len());
    Ok(ends)
}

/// A mask: 0 and 1, or false and true.
fn bits(name: &str, value: &Value) -> Result<Vec<bool>, String> {
    let Value::Array(items) = value else {
        return Err(format!(
            "`{name}` must be a list of 0 and 1, found {}",
            json_kind(value)
        ));
    };
    let bit = |(i, item): (usize, &Value)| match (item.as_bool(), item.as_u64()) {
        (Some(bit), _) => Ok(bit),
        (None, Some(0)) => Ok(false),
        (None, Some(1)) => Ok(true),
        _ => Err(format!("`{name}[{i}]` is {}; expected 0 or 1", short(item))),
    };
    items.iter().enumerate().map(bit).collect()
}

/// A value in a message, which may be a whole text.
fn short(value: &Value) -> String {
    match value {
        Value::Bool(_) | Value::Number(_) | Value::Null => value.to_string(),
        other => json_kind(other).to_owned(),
    }
}

fn integers<T: TryFrom<i64>>(name: &str, value: &Value, least: i64) -> Result<Vec<T>, String> {
    let Value::Array(items) = value else {
        return Err(format!(
            "`{name}` must be a list of integers, found {}",
            json_kind(value)
        ));
    };
    let read = |(i, item): (usize, &Value)| {
        let integer = item
            .as_i64()
            .filter(|n| (least..=i64::from(i32::MAX)).contains(n));
        integer.and_then(|n| T::try_from(n).ok()).ok_or_else(|| {
            format!(
                "`{name}[{i}]` is {}; expected an integer from {least} to {}",
                short(item),
                i32::MAX
            )
        })
    };
    items.iter().enumerate().map(read).collect()
}

/// Gives columns the names that are looked for.
///
/// # Errors
/// A column that would get the name of another one.
pub fn rename_columns(
    row: Map<String, Value>,
    names: &std::collections::BTreeMap<String, String>,
) -> Result<Map<String, Value>, String> {
    if names.is_empty() {
        return Ok(row);
    }
    let mut renamed = Map::new();
    for (name, value) in row {
        let new = names.get(&name).cloned().unwrap_or(name);
        if renamed.insert(new.clone(), value).is_some() {
            return Err(format!(
                "two columns would be named `{new}` (key `dataset_columns`)"
            ));
        }
    }
    Ok(renamed)
}

impl TemplateInputs {
    /// Reads `tools`, `chat_template_kwargs` and `unmask` of a row.
    pub(super) fn of_row(row: &Map<String, Value>) -> Result<Self, String> {
        let mut inputs = super::template_inputs(row)?;
        inputs.trained = instructlab::trained_turns(row)?;
        Ok(inputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(row: &Value) -> Result<Record, String> {
        Record::from_row(row.as_object().expect("a row is an object"), "text")
    }

    #[test]
    fn sharegpt_turns_are_messages() {
        let row = json!({"conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a", "weight": 1}, {"role": "user", "content": "r"}]});
        let Ok(Record::Messages { messages, .. }) = read(&row) else {
            panic!("{:?}", read(&row));
        };
        let fields: Vec<_> = messages.iter().map(|m| json!(m.fields())).collect();
        let expected = json!([
            {"role": "system", "content": "s"}, {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "weight": 1}, {"role": "user", "content": "r"}]);
        assert_eq!(json!(fields), expected);
    }

    #[test]
    fn alpaca_rows_are_prompt_and_completion() {
        let prompt = |row: Value| match read(&row) {
            Ok(Record::PromptCompletion { prompt, completion }) => {
                assert_eq!(completion, "o");
                prompt
            }
            other => panic!("{other:?}"),
        };
        let short = prompt(json!({"instruction": "i", "output": "o", "input": ""}));
        assert!(
            short.ends_with("### Instruction:\ni\n\n### Response:\n"),
            "{short}"
        );
        let long = prompt(json!({"instruction": "i", "input": "x", "output": "o"}));
        assert!(
            long.contains("\n\n### Input:\nx\n\n### Response:\n"),
            "{long}"
        );
    }

    #[test]
    fn tokens_come_with_labels_with_masks_or_alone() {
        let table = [
            (json!({"input_ids": [1, 2]}), [1, 2]),
            (json!({"input_ids": [1, 2], "labels": [-100, 2]}), [-100, 2]),
            (
                json!({"input_ids": [1, 2], "completion_mask": [0, 1]}),
                [-100, 2],
            ),
            (
                json!({"input_ids": [1, 2], "assistant_masks": [1, 0], "text": "t"}),
                [1, -100],
            ),
            (
                json!({"input_ids": [1, 2], "assistant_masks": [true, false]}),
                [1, -100],
            ),
            // As in TRL, labels are left as they are.
            (
                json!({"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [0, 1]}),
                [1, 2],
            ),
        ];
        for (row, expected) in table {
            let labels = expected.to_vec();
            let input_ids = vec![1, 2];
            assert_eq!(read(&row), Ok(Record::Tokens { input_ids, labels }));
        }
    }

    #[test]
    fn padding_is_no_token_and_packed_documents_are_apart() {
        let documents = |row: Value| {
            let row = row.as_object().expect("a row is an object");
            let read = Record::documents_of_row(row, "text").expect("a well-formed row");
            let ids = read.into_iter().map(|record| match record {
                Record::Tokens { input_ids, labels } => (input_ids, labels),
                other => panic!("{other:?}"),
            });
            ids.collect::<Vec<_>>()
        };
        let one = |ids: [u32; 3]| vec![(ids.to_vec(), ids.map(|id| id as i32).to_vec())];
        for row in [
            json!({"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}),
            json!({"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}),
            json!({"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2]}),
        ] {
            assert_eq!(documents(row), one([5, 6, 7]));
        }
        let packed = vec![(vec![5, 6], vec![5, -100]), (vec![7, 8, 9], vec![7, 8, 9])];
        let labels = json!([5, -100, 7, 8, 9]);
        for (key, value) in [
            ("position_ids", json!([0, 1, 0, 1, 2])),
            ("seq_lengths", json!([2, 3])),
        ] {
            let mut row = json!({"input_ids": [5, 6, 7, 8, 9], "labels": labels});
            row[key] = value;
            assert_eq!(documents(row.clone()), packed);
            let message = read(&row).expect_err("not one document");
            assert!(message.contains("2 documents"), "{message}");
        }
    }

    #[test]
    fn wrong_rows_are_explained() {
        let table = [
            (
                json!({"conversations": [{"value": "x"}]}),
                "`conversations[0]` must have `from`",
            ),
            (
                json!({"conversations": 1}),
                "`conversations` must be a list of messages",
            ),
            (
                json!({"instruction": 1, "output": "o"}),
                "`instruction` must be a string",
            ),
            (
                json!({"input_ids": "1"}),
                "`input_ids` must be a list of integers",
            ),
            (
                json!({"input_ids": [1.5]}),
                "`input_ids[0]` is 1.5; expected an integer from 0",
            ),
            (
                json!({"input_ids": [1], "labels": []}),
                "`labels` has 0 entries",
            ),
            (
                json!({"input_ids": [1], "labels": [-3]}),
                "`labels` holds -3",
            ),
            (
                json!({"input_ids": [1, 2], "attention_mask": [0, 2]}),
                "`attention_mask[1]` is 2; expected 0 or 1",
            ),
            (
                json!({"input_ids": [1, 2], "assistant_masks": [1, 0.5]}),
                "`assistant_masks[1]` is 0.5; expected 0 or 1",
            ),
            (
                json!({"input_ids": [1, 2], "completion_mask": [-1, "a long text"]}),
                "`completion_mask[0]` is -1",
            ),
            (
                json!({"input_ids": [1, 2], "completion_mask": "11"}),
                "`completion_mask` must be a list of 0 and 1, found a string",
            ),
            (
                json!({"input_ids": [1, "a text"]}),
                "`input_ids[1]` is a string; expected an integer",
            ),
            (
                json!({"input_ids": [1, 2, 3], "position_ids": [0, 1, 3]}),
                "`position_ids[2]` is 3; expected 2, or 0 where a document begins",
            ),
            (
                json!({"input_ids": [1, 2], "position_ids": [1, 2]}),
                "`position_ids[0]` is 1; expected 0",
            ),
            (
                json!({"input_ids": [1, 2], "seq_lengths": [1, 2]}),
                "`seq_lengths` are 3 tokens together and `input_ids` has 2",
            ),
        ];
        for (row, expected) in table {
            let message = read(&row).expect_err("the row is wrong");
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
    }

    #[test]
    fn columns_are_renamed() {
        let names = [("q", "prompt"), ("a", "completion")];
        let names = names.map(|(a, b)| (a.to_owned(), b.to_owned())).into();
        let row = |value: Value| value.as_object().expect("an object").clone();
        let renamed = rename_columns(row(json!({"q": "x", "a": "y", "id": 1})), &names);
        let expected = row(json!({"prompt": "x", "completion": "y", "id": 1}));
        assert_eq!(renamed, Ok(expected));
        let twice = rename_columns(row(json!({"q": "x", "prompt": "y"})), &names);
        assert!(twice.is_err());
    }
}
