//! Chat templates: Jinja as transformers renders it, in a sandbox.
//!
//! A template comes with a model, so it is untrusted code. It has no loader (no include, import or
//! extends), no functions but the listed ones, a budget of work, a cap on its output, and a fixed
//! date.
//!
//! # Source
//! transformers' `apply_chat_template`: an immutable sandboxed environment with trimmed and
//! left-stripped blocks, loop controls, `tojson`, `raise_exception`, `strftime_now` and
//! `{% generation %}`.

mod environment;
mod expression;
mod generation;
mod lexer;
mod literal;
mod python;
mod rewrite;
mod strftime;
#[cfg(test)]
mod tests;
mod tojson;

use crate::data::record::Message;
use crate::{Error, Result};
use environment::{CappedOutput, environment, explain, json_to_value};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

/// The date that `strftime_now` shows: 26 July 2024, in seconds since 1970-01-01 UTC.
///
/// It is fixed because the same rows must give the same tokens on every day and after a resume.
/// It is the date that the Llama 3.1 templates fall back to.
pub const DEFAULT_DATE: i64 = 1_721_952_000;

/// The longest text a template may render: 64 MiB.
const MAX_OUTPUT_BYTES: usize = 64 << 20;

/// The longest source of a template: 1 MiB, some thirty times the longest of a published model.
const MAX_SOURCE_BYTES: u64 = 1 << 20;

/// Stack for templates that can build deeply nested values: the budget of work allows some 500000
/// levels, at about 200 bytes each. Pages that are not touched cost nothing.
const DEEP_STACK_BYTES: usize = 256 << 20;

/// A template without namespaces nests values only as deep as its source has brackets.
const SHALLOW_BRACKETS: usize = 2000;

const NAME: &str = "chat_template";
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// How a rendering ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// After the last message.
    #[default]
    Closed,
    /// With the opening of an assistant turn (`add_generation_prompt`).
    GenerationPrompt,
    /// Inside the last message, without what closes it (`continue_final_message`).
    ContinueFinalMessage,
}

/// What is rendered.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// The messages, in order.
    pub messages: &'a [Message],
    /// Tool schemas, a list.
    pub tools: Option<&'a Value>,
    /// More variables of the template (`chat_template_kwargs`), such as `enable_thinking`.
    pub variables: &'a Map<String, Value>,
    /// How the rendering ends.
    pub ending: Ending,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text, to be tokenised without special tokens.
    pub text: String,
    /// The bytes inside `{% generation %}` blocks: what the assistant wrote.
    pub assistant_spans: Vec<Range<usize>>,
}

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    environment: minijinja::Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    has_generation_tags: bool,
    can_nest_deeply: bool,
}

impl ChatTemplate {
    /// Reads the source of a template, and no more of a file than that may have.
    ///
    /// # Errors
    /// [`Error::Read`], and [`Error::Template`] for a file that is too long.
    pub fn read_source(path: &Path) -> Result<String> {
        let file = File::open(path).map_err(Error::read(path))?;
        let mut source = Vec::new();
        let read = file.take(MAX_SOURCE_BYTES + 1).read_to_end(&mut source);
        read.map_err(Error::read(path))?;
        check_length(source.len())?;
        let invalid = |e| Error::read(path)(std::io::Error::other(e));
        String::from_utf8(source).map_err(invalid)
    }

    /// Compiles a template. `special_tokens` (`bos_token`, `eos_token`, ...) become variables.
    ///
    /// # Errors
    /// [`Error::Template`] with the line when it does not parse, and when it is too long.
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        check_length(source.len())?;
        let (rewritten, has_generation_tags) = rewrite::rewrite(source).map_err(template_error)?;
        let mut environment = environment(DEFAULT_DATE)?;
        environment
            .add_template_owned(NAME, rewritten)
            .map_err(|e| template_error(explain(&e)))?;
        Ok(Self {
            source: source.to_owned(),
            environment,
            special_tokens: special_tokens.clone(),
            has_generation_tags,
            can_nest_deeply: source.contains("namespace")
                || source.matches(['[', '{', '(']).count() > SHALLOW_BRACKETS,
        })
    }

    /// Sets the date that `strftime_now` shows, in seconds since 1970-01-01 UTC.
    #[must_use]
    pub fn with_date(mut self, seconds: i64) -> Self {
        environment::set_date(&mut self.environment, seconds);
        self
    }

    /// The template as it was given.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template marks what the assistant wrote by `{% generation %}` tags.
    #[must_use]
    pub fn has_generation_tags(&self) -> bool {
        self.has_generation_tags
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`Error::Template`] when the template raises, uses what it may not, works for too long or
    /// writes too much.
    pub fn render(&self, conversation: &Conversation) -> Result<Rendered> {
        let mut messages = conversation
            .messages
            .iter()
            .map(template_message)
            .collect::<Vec<_>>();
        let final_text = match conversation.ending {
            Ending::ContinueFinalMessage => Some(tag_final_message(&mut messages)?),
            Ending::Closed | Ending::GenerationPrompt => None,
        };
        let rendered = self.evaluate(conversation, messages)?;
        let rendered = match final_text {
            Some(text) => cut_at_tag(rendered, &text)?,
            None => rendered,
        };
        if !self.has_generation_tags {
            return Ok(Rendered {
                text: rendered,
                assistant_spans: Vec::new(),
            });
        }
        let closed = close_last_block(rendered, conversation.ending);
        let (text, assistant_spans) = generation::strip_markers(&closed).map_err(template_error)?;
        Ok(Rendered {
            text,
            assistant_spans,
        })
    }

    fn evaluate(&self, conversation: &Conversation, messages: Vec<Value>) -> Result<String> {
        let mut variables: BTreeMap<String, minijinja::Value> = self
            .special_tokens
            .iter()
            .map(|(name, token)| (name.clone(), token.as_str().into()))
            .collect();
        for (name, value) in conversation.variables {
            variables.insert(name.clone(), self.value(value)?);
        }
        let tools = conversation.tools.unwrap_or(&Value::Null);
        variables.insert("tools".into(), self.value(tools)?);
        variables
            .entry("documents".into())
            .or_insert_with(|| ().into());
        variables.insert("messages".into(), self.value(&Value::Array(messages))?);
        let prompt = conversation.ending == Ending::GenerationPrompt;
        variables.insert("add_generation_prompt".into(), prompt.into());

        if !self.can_nest_deeply {
            return self.run(variables);
        }
        // Values are dropped and printed recursively: deep ones need more stack than a thread has.
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .stack_size(DEEP_STACK_BYTES)
                .spawn_scoped(scope, || self.run(variables))
                .map_err(|e| template_error(format!("no thread to render in: {e}")))?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn run(&self, variables: BTreeMap<String, minijinja::Value>) -> Result<String> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|e| template_error(explain(&e)))?;
        let mut output = CappedOutput::new(MAX_OUTPUT_BYTES);
        let context = minijinja::Value::from_pairs(variables);
        template
            .render_captured_to(context, &mut output)
            .map_err(|e| template_error(explain(&e)))?;
        output.into_string().map_err(template_error)
    }

    fn value(&self, json: &Value) -> Result<minijinja::Value> {
        json_to_value(json, self.has_generation_tags).map_err(template_error)
    }
}

fn check_length(bytes: usize) -> Result<()> {
    match bytes as u64 > MAX_SOURCE_BYTES {
        true => Err(template_error(format!(
            "the template has more than {MAX_SOURCE_BYTES} bytes; expected a chat template, which has a few thousand"
        ))),
        false => Ok(()),
    }
}

fn template_error(message: impl Into<String>) -> Error {
    Error::Template {
        message: message.into(),
    }
}

/// A message as templates expect it: no null values, and its reasoning, under whichever name it has, as
/// `reasoning_content` and, where there is none, first of all as `thinking`.
fn template_message(message: &Message) -> Value {
    const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let present = message.fields().iter();
    let present = present.filter(|(_, value)| !value.is_null());
    let fields: Map<String, Value> = present.map(|(n, v)| (n.clone(), v.clone())).collect();
    let reasoning = REASONING.iter().find_map(|name| fields.get(*name)).cloned();
    let Some(reasoning) = reasoning else {
        return Value::Object(fields);
    };
    let mut named = Map::new();
    named.insert("thinking".to_owned(), reasoning.clone());
    named.extend(fields);
    named.insert("reasoning_content".to_owned(), reasoning);
    Value::Object(named)
}

/// Marks the end of the last message's text; gives that text.
fn tag_final_message(messages: &mut [Value]) -> Result<String> {
    let content = messages.last_mut().and_then(|m| m.get_mut("content"));
    let text = match content {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => {
            parts
                .iter_mut()
                .rev()
                .find_map(|part| match part.get_mut("text") {
                    Some(Value::String(text)) => Some(text),
                    _ => None,
                })
        }
        _ => None,
    };
    let text = text.ok_or_else(|| {
        template_error("the final message has no text to continue (continue_final_message)")
    })?;
    let original = text.clone();
    text.push_str(CONTINUE_TAG);
    Ok(original)
}

/// Cuts a rendering where the final message's text ends.
fn cut_at_tag(mut rendered: String, final_text: &str) -> Result<String> {
    let at = rendered.rfind(CONTINUE_TAG.trim_end());
    match at {
        Some(at) if rendered.contains(final_text.trim()) => {
            let kept_space = rendered[at..].starts_with(CONTINUE_TAG);
            rendered.truncate(at);
            if !kept_space {
                rendered.truncate(rendered.trim_end().len());
            }
            Ok(rendered)
        }
        _ => Err(template_error(
            "the final message is not in the rendered text as it was given, so it cannot be \
             continued (continue_final_message)",
        )),
    }
}

/// Cutting inside a message leaves its generation block open: closes it.
fn close_last_block(mut rendered: String, ending: Ending) -> String {
    if ending == Ending::ContinueFinalMessage
        && rendered.rfind(generation::BEGIN) > rendered.rfind(generation::END)
    {
        rendered.push(generation::END);
    }
    rendered
}
