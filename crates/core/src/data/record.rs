//! What a row of a data set says, before it is tokenised.

mod columns;
mod formats;
mod instructlab;

pub(super) use columns::unused;
pub use formats::rename_columns;

use crate::data::jsonl::json_kind;
use crate::suggest::did_you_mean;
use columns::Format;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One message of a conversation: `role`, `content` and whatever else the template reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    fields: Map<String, Value>,
}

impl Message {
    /// A message of plain text.
    #[must_use]
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), Value::String(role.into()));
        fields.insert("content".into(), Value::String(content.into()));
        Self { fields }
    }

    /// A message from a JSON object.
    ///
    /// # Errors
    /// What is wrong, when it is not an object with a string `role`, and `content` or `tool_calls`.
    pub fn from_json(value: &Value) -> Result<Self, String> {
        let Value::Object(fields) = value else {
            return Err(format!(
                "expected an object with `role` and `content`, found {}",
                json_kind(value)
            ));
        };
        match fields.get("role") {
            // A template would fail on it, or make an empty turn of it that is then trained.
            Some(Value::String(role)) if says_nothing(fields) => Err(format!(
                "`content` of a message by `{role}` is missing; expected text, or `tool_calls` in its place"
            )),
            Some(Value::String(_)) => Ok(Self {
                fields: fields.clone(),
            }),
            Some(other) => Err(format!(
                "`role` must be a string, found {}",
                json_kind(other)
            )),
            None => {
                let found: Vec<&str> = fields.keys().map(String::as_str).collect();
                Err(format!(
                    "`role` is missing, found {}; a message is \
                     {{\"role\": \"user\", \"content\": \"...\"}}",
                    list(&found)
                ))
            }
        }
    }

    /// Who speaks, as the template knows it.
    #[must_use]
    pub fn role(&self) -> &str {
        self.fields
            .get("role")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The content: a string, a list of parts, or nothing.
    #[must_use]
    pub fn content(&self) -> Option<&Value> {
        self.fields.get("content")
    }

    /// Says something else.
    pub(super) fn set_content(&mut self, text: String) {
        self.fields.insert("content".into(), Value::String(text));
    }

    /// The same, said by another.
    pub(super) fn with_role(&self, role: &str) -> Self {
        let mut fields = self.fields.clone();
        fields.insert("role".into(), role.into());
        Self { fields }
    }

    /// Every field, in the order of the row.
    #[must_use]
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }
}

/// What the template gets besides messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TemplateInputs {
    /// Tool schemas (`tools`): a list.
    pub tools: Option<Value>,
    /// Variables of the template (`chat_template_kwargs`).
    pub chat_template_kwargs: Map<String, Value>,
    /// What of this row is trained, whatever the other rows do (InstructLab's `unmask`).
    pub trained: Option<TrainedTurns>,
}

/// Whose turns of a conversation are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainedTurns {
    /// The assistant's.
    Assistant,
    /// The assistant's, and what everyone but the system says.
    AllButSystem,
}

/// One row of a data set.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation.
    Messages {
        /// The messages, in order.
        messages: Vec<Message>,
        /// Tools and variables.
        inputs: TemplateInputs,
    },
    /// Text that is given, and text that is learnt.
    PromptCompletion {
        /// What is given.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// A conversation that is given, and its continuation, which is learnt.
    PromptCompletionMessages {
        /// What is given.
        prompt: Vec<Message>,
        /// What is learnt.
        completion: Vec<Message>,
        /// Tools and variables.
        inputs: TemplateInputs,
    },
    /// Text.
    Text(String),
    /// Tokens: nothing is added to them.
    Tokens {
        /// Token ids, `[T]`.
        input_ids: Vec<u32>,
        /// Labels, `[T]`: token ids, or -100 for what is not trained.
        labels: Vec<i32>,
    },
}

/// The kinds of [`Record`]. The first row of a data set decides for all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordKind {
    /// [`Record::Messages`].
    Messages,
    /// [`Record::PromptCompletion`].
    PromptCompletion,
    /// [`Record::PromptCompletionMessages`].
    PromptCompletionMessages,
    /// [`Record::Text`].
    Text,
    /// [`Record::Tokens`].
    Tokens,
}

impl std::fmt::Display for RecordKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Messages => "`messages`",
            Self::PromptCompletion => "`prompt` and `completion` as text",
            Self::PromptCompletionMessages => "`prompt` and `completion` as messages",
            Self::Text => "text",
            Self::Tokens => "`input_ids`",
        })
    }
}

/// The column that masks completions of `input_ids`.
pub(super) const COMPLETION_MASK: &str = "completion_mask";

impl Record {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> RecordKind {
        match self {
            Self::Messages { .. } => RecordKind::Messages,
            Self::PromptCompletion { .. } => RecordKind::PromptCompletion,
            Self::PromptCompletionMessages { .. } => RecordKind::PromptCompletionMessages,
            Self::Text(_) => RecordKind::Text,
            Self::Tokens { .. } => RecordKind::Tokens,
        }
    }

    /// Takes the mask of completions out of a row where it does not count, and says whether there was one. As in TRL, an
    /// unset `completion_only_loss` means no where there are no prompts and completions.
    pub fn leaves_mask_out(
        row: &mut Map<String, Value>,
        completion_only_loss: Option<bool>,
    ) -> bool {
        completion_only_loss != Some(true)
            && row
                .remove(COMPLETION_MASK)
                .is_some_and(|mask| !mask.is_null())
    }

    /// Reads a row by its columns: `input_ids`, `prompt` with `completion`, `messages`,
    /// `conversations`, the column that `text_field` names, `document`, or `instruction` with `output`,
    /// whichever of these is there first. Other columns are ignored, and so are those that are null.
    ///
    /// # Errors
    /// What is wrong, what was found and what is accepted. A packed row is more than one record: see
    /// [`Record::documents_of_row`].
    ///
    /// # Source
    /// The data formats of TRL's `SFTTrainer`.
    pub fn from_row(row: &Map<String, Value>, text_field: &str) -> Result<Self, String> {
        let mut documents = Self::documents_of_row(row, text_field)?;
        match (documents.pop(), documents.len()) {
            (Some(only), 0) => Ok(only),
            (_, others) => Err(format!("holds {} documents; expected one", others + 1)),
        }
    }

    /// Reads a row of tokens that several documents may be packed into, as its `seq_lengths` or `position_ids`
    /// say; any other row is one record, as [`Record::from_row`] reads it. At least one.
    ///
    /// # Errors
    /// As there.
    pub fn documents_of_row(
        row: &Map<String, Value>,
        text_field: &str,
    ) -> Result<Vec<Self>, String> {
        let format = Format::of(row, text_field).ok_or_else(|| unknown_columns(row, text_field))?;
        let column = |name: &str| row.get(name).unwrap_or(&Value::Null);
        let record = match format {
            Format::Tokens => return formats::tokens(row, column("input_ids")),
            Format::Pair => prompt_completion(row, column("prompt"), column("completion")),
            Format::Messages => conversation(row, "messages", column("messages")),
            Format::Conversations => {
                let messages = formats::conversations(column("conversations"))?;
                conversation(row, "conversations", &messages)
            }
            Format::Text => text(text_field, column(text_field)),
            // InstructLab's rows for pre-training.
            Format::Document => text("document", column("document")),
            Format::Alpaca => formats::alpaca(row),
        };
        Ok(vec![record?])
    }
}

fn text(column: &str, value: &Value) -> Result<Record, String> {
    match value {
        Value::String(text) => Ok(Record::Text(text.clone())),
        other => Err(format!(
            "`{column}` must be a string, found {}",
            json_kind(other)
        )),
    }
}

fn conversation(
    row: &Map<String, Value>,
    column: &str,
    messages: &Value,
) -> Result<Record, String> {
    let mut messages = read_messages(column, messages)?;
    let mut inputs = TemplateInputs::of_row(row)?;
    if instructlab::unroll(column, &mut messages)? {
        inputs.trained = Some(TrainedTurns::AllButSystem);
    }
    Ok(Record::Messages { messages, inputs })
}

fn prompt_completion(
    row: &Map<String, Value>,
    prompt: &Value,
    completion: &Value,
) -> Result<Record, String> {
    match (prompt, completion) {
        (Value::String(prompt), Value::String(completion)) => Ok(Record::PromptCompletion {
            prompt: prompt.clone(),
            completion: completion.clone(),
        }),
        (Value::Array(_), Value::Array(_)) => Ok(Record::PromptCompletionMessages {
            prompt: read_messages("prompt", prompt)?,
            completion: read_messages("completion", completion)?,
            inputs: TemplateInputs::of_row(row)?,
        }),
        _ => Err(format!(
            "`prompt` and `completion` must both be strings or both be lists of messages, found \
             {} and {}",
            json_kind(prompt),
            json_kind(completion)
        )),
    }
}

pub(super) fn read_messages(column: &str, value: &Value) -> Result<Vec<Message>, String> {
    let Value::Array(items) = value else {
        return Err(format!(
            "`{column}` must be a list of messages, found {}",
            json_kind(value)
        ));
    };
    if items.is_empty() {
        return Err(format!("`{column}` holds no message"));
    }
    items
        .iter()
        .enumerate()
        .map(|(i, item)| Message::from_json(item).map_err(|e| format!("`{column}[{i}]`: {e}")))
        .collect()
}

pub(super) fn template_inputs(row: &Map<String, Value>) -> Result<TemplateInputs, String> {
    let tools = match row.get("tools") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) if text.trim().is_empty() => None,
        Some(Value::String(text)) => {
            Some(serde_json::from_str(text).map_err(|e| format!("`tools` is not JSON: {e}"))?)
        }
        Some(value) => Some(value.clone()),
    };
    if let Some(other) = tools.as_ref().filter(|t| !t.is_array() && !t.is_null()) {
        return Err(format!(
            "`tools` must be a list of JSON schemas, found {}",
            json_kind(other)
        ));
    }
    Ok(TemplateInputs {
        tools: tools.filter(|t| !t.is_null()),
        chat_template_kwargs: template_variables(row)?,
        trained: None,
    })
}

/// What `apply_chat_template` of Transformers takes for itself, and no template gets from a row.
const NOT_VARIABLES: [&str; 14] = [
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
];

/// The variables of the template that a row brings.
fn template_variables(row: &Map<String, Value>) -> Result<Map<String, Value>, String> {
    let variables = match row.get("chat_template_kwargs") {
        None | Some(Value::Null) => return Ok(Map::new()),
        Some(Value::Object(variables)) => variables,
        Some(other) => {
            return Err(format!(
                "`chat_template_kwargs` must be an object, found {}",
                json_kind(other)
            ));
        }
    };
    let taken = NOT_VARIABLES.iter().find(|n| variables.contains_key(**n));
    let Some(taken) = taken else {
        return Ok(variables.clone());
    };
    let instead = match *taken {
        "messages" | "conversation" => "give the row `messages`",
        "tools" => "give the row `tools`",
        "chat_template" => "set `chat_template_path`",
        "max_length" | "truncation" => "set `max_length` and `truncation_mode`",
        _ => "leave it out",
    };
    Err(format!(
        "`chat_template_kwargs` holds `{taken}`, which is no variable of the row: preparation decides it \
         itself; {instead}"
    ))
}

fn unknown_columns(row: &Map<String, Value>, text_field: &str) -> String {
    let found: Vec<&str> = row.keys().map(String::as_str).collect();
    let missing = match (row.contains_key("prompt"), row.contains_key("completion")) {
        (true, false) => vec!["completion"],
        (false, true) => vec!["prompt"],
        _ => vec![
            "messages",
            "prompt",
            "completion",
            "conversations",
            text_field,
        ],
    };
    let known = ["messages", "completion", "conversations", text_field];
    let is_null = |name: &&str| row.get(*name).is_some_and(Value::is_null);
    if let Some(name) = known.into_iter().find(is_null) {
        return format!("`{name}` is null, and no other column can be trained on");
    }
    // The near miss is among the row's own columns, so it is they that are offered.
    let hint = missing
        .iter()
        .map(|name| did_you_mean(name, found.iter().copied()).replace("did you mean", "is it"))
        .find(|hint| !hint.is_empty())
        .unwrap_or_default();
    format!(
        "no columns to train on: found {}; expected `messages`, `prompt` and `completion`, \
         `conversations`, `instruction` and `output`, `input_ids`, or `{text_field}` (key \
         `dataset_text_field`); key `dataset_columns` renames columns{hint}",
        list(&found)
    )
}

/// Names in backquotes, at most a dozen.
pub(super) fn list(names: &[&str]) -> String {
    if names.is_empty() {
        return "nothing".into();
    }
    let shown: Vec<String> = names.iter().take(12).map(|n| format!("`{n}`")).collect();
    let more = names.len().saturating_sub(12);
    let tail = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    shown.join(", ") + &tail
}

/// Whether a message has neither content nor calls of tools.
fn says_nothing(fields: &Map<String, Value>) -> bool {
    let lacks = |key| fields.get(key).is_none_or(Value::is_null);
    lacks("content") && lacks("tool_calls")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(row: &Value) -> Result<Record, String> {
        Record::from_row(row.as_object().expect("a row is an object"), "text")
    }

    #[test]
    fn columns_decide_the_kind_and_other_columns_are_ignored() {
        let message = json!([{"role": "alien", "content": null, "tool_calls": []}]);
        let table = [
            (json!({"id": 1, "text": "a"}), RecordKind::Text),
            (json!({"document": "a", "text": null}), RecordKind::Text),
            (
                json!({"prompt": "a", "completion": "b"}),
                RecordKind::PromptCompletion,
            ),
            (
                json!({"prompt": message, "completion": message, "tools": "[]"}),
                RecordKind::PromptCompletionMessages,
            ),
            (
                json!({"prompt": "p", "messages": message, "text": "t"}),
                RecordKind::Messages,
            ),
        ];
        for (row, kind) in table {
            assert_eq!(read(&row).map(|r| r.kind()), Ok(kind));
        }
    }

    #[test]
    fn wrong_rows_are_explained() {
        let table = [
            (json!({}), "found nothing; expected `messages`"),
            (json!({"promt": "a", "completion": "b"}), "is it `promt`?"),
            (json!({"message": []}), "is it `message`?"),
            (json!({"messages": null}), "`messages` is null"),
            (
                json!({"prompt": "a", "completion": null}),
                "`completion` is null",
            ),
            (
                json!({"text": 1}),
                "`text` must be a string, found a number",
            ),
            (
                json!({"prompt": "a", "completion": []}),
                "found a string and an array",
            ),
            (
                json!({"messages": "hi"}),
                "`messages` must be a list of messages",
            ),
            (json!({"messages": []}), "holds no message"),
            (
                json!({"messages": [3]}),
                "`messages[0]`: expected an object",
            ),
            (
                json!({"messages": [{"role": 1}]}),
                "`role` must be a string",
            ),
            (
                json!({"messages": [{"from": "human"}]}),
                "`role` is missing, found `from`",
            ),
            (
                json!({"messages": [{"role": "u", "content": "c"}], "tools": "{"}),
                "`tools` is not JSON",
            ),
            (
                json!({"messages": [{"role": "u", "content": "c"}], "tools": {}}),
                "`tools` must be a list",
            ),
            (
                json!({"messages": [{"role": "u", "content": "c"}], "chat_template_kwargs": 1}),
                "must be an object",
            ),
            (
                json!({"messages": [{"role": "u", "content": "c"}], "chat_template_kwargs": {"messages": []}}),
                "holds `messages`, which is no variable of the row",
            ),
            (
                json!({"prompt": [{"role": "u", "content": "c"}], "completion": [{"role": "u", "content": "c"}],
                       "chat_template_kwargs": {"x": 1, "add_generation_prompt": true}}),
                "holds `add_generation_prompt`, which",
            ),
        ];
        for (row, expected) in table {
            let message = read(&row).expect_err("the row is wrong");
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
    }
}
