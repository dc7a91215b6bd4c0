//! Which columns of a row are read, and which are not.

use serde_json::{Map, Value};

/// What the columns of a row make of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Tokens,
    Pair,
    Messages,
    Conversations,
    Text,
    Document,
    Alpaca,
}

const OF_MESSAGES: [&str; 4] = ["messages", "conversations", "prompt", "completion"];

/// What a chat template, or the mask of what it renders, is given beside messages.
const BESIDE_MESSAGES: [&str; 3] = ["tools", "chat_template_kwargs", "unmask"];

impl Format {
    /// The first whose columns are there and not null.
    pub(super) fn of(row: &Map<String, Value>, text_field: &str) -> Option<Self> {
        let has = |name: &str| row.get(name).is_some_and(|value| !value.is_null());
        let found = [
            (Self::Tokens, has("input_ids")),
            (Self::Pair, has("prompt") && has("completion")),
            (Self::Messages, has("messages")),
            (Self::Conversations, has("conversations")),
            (Self::Text, has(text_field)),
            (
                Self::Document,
                row.get("document").is_some_and(Value::is_string),
            ),
            (Self::Alpaca, has("instruction") && has("output")),
        ];
        let first = found.into_iter().find(|(_, is_there)| *is_there);
        first.map(|(format, _)| format)
    }

    fn reads(self, row: &Map<String, Value>, column: &str, text_field: &str) -> bool {
        let is_chat = match self {
            Self::Messages | Self::Conversations => true,
            Self::Pair => row["prompt"].is_array(),
            _ => false,
        };
        if is_chat && BESIDE_MESSAGES.contains(&column) {
            return true;
        }
        match self {
            // Labels say already what masks would.
            Self::Tokens if [super::COMPLETION_MASK, "assistant_masks"].contains(&column) => {
                row.get("labels").is_none_or(Value::is_null)
            }
            Self::Tokens => [
                "input_ids",
                "labels",
                "attention_mask",
                "position_ids",
                "seq_lengths",
            ]
            .contains(&column),
            Self::Pair => ["prompt", "completion"].contains(&column),
            Self::Messages => column == "messages",
            Self::Conversations => column == "conversations",
            Self::Text => column == text_field,
            Self::Document => column == "document",
            Self::Alpaca => ["instruction", "input", "output"].contains(&column),
        }
    }
}

/// The columns of a row that hold something and that nothing reads, and the `weight` of messages, by which nothing is
/// weighed. None of a row that is of no format.
pub(in crate::data) fn unused(row: &Map<String, Value>, text_field: &str) -> Vec<String> {
    let Some(format) = Format::of(row, text_field) else {
        return Vec::new();
    };
    let is_weighed = |column: &str, value: &Value| {
        let mut messages = value.as_array().into_iter().flatten();
        OF_MESSAGES.contains(&column)
            && messages.any(|message| {
                message
                    .get("weight")
                    .is_some_and(|weight| !weight.is_null())
            })
    };
    let columns = row.iter().filter(|(_, value)| !value.is_null());
    let name = |(column, value): (&String, &Value)| {
        let is_read = format.reads(row, column, text_field);
        match is_read && is_weighed(column, value) {
            true => Some(format!("{column}[].weight")),
            false => (!is_read).then(|| column.clone()),
        }
    };
    columns.filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_nothing_reads_is_told_from_what_is_read() {
        let turns =
            json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]);
        let message = json!([{"role": "user", "content": "q", "weight": null}]);
        for (row, expected) in [
            (json!({"text": "a", "id": 1, "tools": null}), vec!["id"]),
            (json!({"body": "a", "text": "b"}), vec!["body"]),
            (
                json!({"conversations": turns, "system": "s", "tools": "[]"}),
                vec!["conversations[].weight", "system"],
            ),
            (
                json!({"messages": message, "unmask": true, "text": "t"}),
                vec!["text"],
            ),
            (
                json!({"prompt": "p", "completion": "c", "tools": []}),
                vec!["tools"],
            ),
            (
                json!({"prompt": message, "completion": turns, "tools": []}),
                vec!["completion[].weight"],
            ),
            (
                json!({"input_ids": [1], "labels": [1], "assistant_masks": [1], "attention_mask": [1]}),
                vec!["assistant_masks"],
            ),
            (json!({"input_ids": [1], "assistant_masks": [1]}), vec![]),
            (
                json!({"instruction": "i", "input": "", "output": "o", "document": "d"}),
                vec!["input", "instruction", "output"],
            ),
            (json!({"nothing": 1}), vec![]),
        ] {
            let mut found = unused(row.as_object().expect("an object"), "text");
            found.sort();
            assert_eq!(found, expected, "{row}");
        }
    }
}
