//! What a model is asked, as training showed it.

#[cfg(test)]
mod tests;

use crate::data::chat_template::{Conversation, Ending};
use crate::data::jsonl::json_kind;
use crate::data::record::{Message, Record, TemplateInputs, list, read_messages, template_inputs};
use crate::data::roles;
use crate::data::tokenizer::{SpecialTokens, Tokenizer};
use crate::{Error, Result};
use serde_json::{Map, Value};

/// What comes before an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Text to go on from. No chat template touches it.
    Text(String),
    /// A conversation that waits for the assistant.
    Chat {
        /// The messages, in order.
        messages: Vec<Message>,
        /// Tools and variables of the template.
        inputs: TemplateInputs,
    },
}

impl Prompt {
    /// A conversation of one message, the user's.
    #[must_use]
    pub fn user(text: &str) -> Self {
        Self::Chat {
            messages: vec![Message::new("user", text)],
            inputs: TemplateInputs::default(),
        }
    }

    /// Reads a row that may lack its answer: `prompt`, as text or as messages, or `messages`. Other
    /// columns than the template's are ignored.
    ///
    /// # Errors
    /// What is wrong, what was found and what is accepted.
    pub fn from_row(row: &Map<String, Value>) -> Result<Self, String> {
        match row.get("prompt") {
            Some(Value::String(text)) => return Ok(Self::Text(text.clone())),
            None | Some(Value::Array(_)) => {}
            Some(other) => {
                let found = json_kind(other);
                return Err(format!(
                    "`prompt` must be a string or a list of messages, found {found}"
                ));
            }
        }
        let column = ["prompt", "messages"].into_iter().find_map(|name| {
            let value = row.get(name)?;
            Some((name, value))
        });
        let Some((name, value)) = column else {
            let found: Vec<&str> = row.keys().map(String::as_str).collect();
            return Err(format!(
                "nothing to answer: found {}; expected `prompt` or `messages`",
                list(&found)
            ));
        };
        Ok(Self::Chat {
            messages: read_messages(name, value)?,
            inputs: template_inputs(row)?,
        })
    }

    /// What a training row asks and the text that it teaches as the answer: the completion, or the
    /// last message where that is the assistant's. None for a row without such an answer.
    #[must_use]
    pub fn with_answer(record: Record) -> Option<(Self, String)> {
        let text = |message: &Message| message.content()?.as_str().map(str::to_owned);
        match record {
            Record::Messages {
                mut messages,
                inputs,
            } => {
                let last = messages.pop().filter(|m| m.role() == "assistant")?;
                Some((Self::Chat { messages, inputs }, text(&last)?))
            }
            Record::PromptCompletionMessages {
                prompt,
                completion,
                inputs,
            } => {
                let answer = text(completion.first()?)?;
                let messages = prompt;
                Some((Self::Chat { messages, inputs }, answer))
            }
            Record::PromptCompletion { prompt, completion } => {
                Some((Self::Text(prompt), completion))
            }
            Record::Text(_) | Record::Tokens { .. } => None,
        }
    }

    /// The text, or what the last message says.
    #[must_use]
    pub fn last_text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Chat { messages, .. } => messages
                .last()
                .and_then(|m| m.content()?.as_str())
                .unwrap_or_default(),
        }
    }

    /// Token ids, `[T]`: those that training puts before the answer.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer lacks a chat template for a conversation or refuses the
    /// text, [`Error::Template`] when the template refuses the messages or does not know a role.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let (messages, inputs) = match self {
            Self::Text(text) => return tokenizer.encode_prompt(text),
            Self::Chat { messages, inputs } => (messages, inputs),
        };
        let tools = inputs.tools.as_ref();
        let template = tokenizer.chat_template(tools).ok_or_else(|| {
            Error::model(
                tokenizer.path(),
                "the prompt is a conversation but the tokenizer has no chat template; add \
                 chat_template.jinja beside it, or ask in plain text",
            )
        })?;
        let render = |messages: &[Message]| {
            template.render(&Conversation {
                messages,
                tools,
                variables: &inputs.chat_template_kwargs,
                ending: Ending::GenerationPrompt,
            })
        };
        roles::check(messages, |messages| render(messages).ok())
            .map_err(|message| Error::Template { message })?;
        tokenizer.encode(&render(messages)?.text, SpecialTokens::Omit)
    }
}
