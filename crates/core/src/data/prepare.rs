//! From a record to token ids and labels.
//!
//! # Source
//! The preparation of TRL's `SFTTrainer`, with two differences: what is trained is found by the
//! offsets of one joint tokenisation instead of the length of the prompt's own, and a row that
//! cannot be masked is an error instead of a warning.

mod instructlab;
mod report;
#[cfg(test)]
mod tests;

pub use crate::config::{BadRows, TruncationMode};
pub use report::PrepareReport;
pub(super) use report::Prepared;

use crate::data::assistant::{Untagged, excerpt, mask_of_spans};
use crate::data::batch::{Example, IGNORE_INDEX};
use crate::data::chat_template::{ChatTemplate, Conversation, Ending, Rendered};
use crate::data::classes::Classes;
use crate::data::record::{Message, Record, RecordKind, TemplateInputs};
use crate::data::roles;
use crate::data::tokenizer::{Encoded, SpecialTokens, Tokenizer};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// How rows become examples. The names and defaults are TRL's.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareOptions {
    /// The column of plain text.
    pub dataset_text_field: String,
    /// Longer rows are cut to this many tokens; none: not cut.
    pub max_length: Option<usize>,
    /// Which end is kept.
    pub truncation_mode: TruncationMode,
    /// Train on the completion alone; unset: where there is one.
    pub completion_only_loss: Option<bool>,
    /// Train on what the assistant says alone.
    pub assistant_only_loss: bool,
    /// Ends text and completions instead of the tokenizer's own EOS token.
    pub eos_token: Option<String>,
    /// Variables of the chat template; those of a row win.
    pub chat_template_kwargs: Map<String, Value>,
    /// Columns of the files to rename, by their name there, before rows are read.
    pub dataset_columns: BTreeMap<String, String>,
    /// What happens to a row that cannot be used.
    pub bad_rows: BadRows,
    /// Keep rows of which no token has a label. TRL drops them where it truncates, and keeps them where it
    /// packs or `max_length` is none.
    pub keep_unlabelled: bool,
    /// The number of token ids that a row of `input_ids` may hold; none: the tokenizer's.
    pub vocab_size: Option<usize>,
    /// The classes that rows are of, where those are learned instead of tokens; nothing is added to text then, and
    /// options of what is trained mean nothing.
    pub classes: Option<Classes>,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self {
            dataset_text_field: "text".into(),
            max_length: Some(1024),
            truncation_mode: TruncationMode::KeepStart,
            completion_only_loss: None,
            assistant_only_loss: false,
            eos_token: None,
            chat_template_kwargs: Map::new(),
            dataset_columns: BTreeMap::new(),
            bad_rows: BadRows::Error,
            keep_unlabelled: false,
            vocab_size: None,
            classes: None,
        }
    }
}

/// A record and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What it says.
    pub record: Record,
    /// Its file.
    pub path: Arc<Path>,
    /// Its line in the file, from 1.
    pub line: u64,
    /// Its class as the row has it, if it does.
    pub label: Option<Value>,
}

/// Turns the rows of one data set into examples.
#[derive(Debug)]
pub struct Preparer<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a PrepareOptions,
    kind: RecordKind,
    eos: &'a str,
    mask_prompt: bool,
}

impl<'a> Preparer<'a> {
    /// Checks that rows of this kind can be prepared with these options.
    ///
    /// # Errors
    /// [`Error::Config`] for an option that does not apply, [`Error::Model`] when the tokenizer
    /// lacks an EOS token or a chat template.
    pub fn new(
        tokenizer: &'a Tokenizer,
        options: &'a PrepareOptions,
        kind: RecordKind,
    ) -> Result<Self> {
        let plain = matches!(kind, RecordKind::Text | RecordKind::PromptCompletion);
        let has_completion = matches!(
            kind,
            RecordKind::PromptCompletion | RecordKind::PromptCompletionMessages
        );
        let is_chat = matches!(
            kind,
            RecordKind::Messages | RecordKind::PromptCompletionMessages
        );
        let eos = options.eos_token.as_deref().or(tokenizer.eos_token());
        if plain && eos.is_none() && options.classes.is_none() {
            return Err(Error::model(
                tokenizer.path(),
                "the tokenizer has no EOS token, so no text would ever end; set `eos_token`",
            ));
        }
        if let Some(eos) = &options.eos_token {
            tokenizer.require_token("eos_token", eos)?;
        }
        let may_be_masked = has_completion || kind == RecordKind::Tokens;
        if options.completion_only_loss == Some(true) && !may_be_masked {
            return Err(Error::config(
                "completion_only_loss",
                format!("needs rows with `prompt` and `completion`; these rows are {kind}"),
            ));
        }
        if options.max_length == Some(0) {
            return Err(Error::config("max_length", "must be at least 1, or null"));
        }
        if !is_chat && options.assistant_only_loss {
            return Err(Error::config(
                "assistant_only_loss",
                format!("needs conversations; these rows are {kind}"),
            ));
        }
        let preparer = Self {
            tokenizer,
            options,
            kind,
            eos: eos.unwrap_or_default(),
            mask_prompt: has_completion
                && options.completion_only_loss != Some(false)
                && options.classes.is_none(),
        };
        if is_chat {
            preparer.template(None)?;
        }
        Ok(preparer)
    }

    fn template(&self, tools: Option<&Value>) -> Result<&'a ChatTemplate> {
        self.tokenizer.chat_template(tools).ok_or_else(|| {
            Error::model(
                self.tokenizer.path(),
                "the rows are conversations but the tokenizer has no chat template; add \
                 chat_template.jinja beside it or set `chat_template_path`",
            )
        })
    }

    /// Whether classes are learned.
    pub(super) fn classifies(&self) -> bool {
        self.options.classes.is_some()
    }

    /// Token ids and labels of a row, not truncated.
    ///
    /// # Errors
    /// [`Error::Data`] or [`Error::Template`], with the file and line of the row.
    pub fn prepare(&self, row: &Row) -> Result<Example> {
        if row.record.kind() != self.kind {
            return Err(Error::data(
                &row.path,
                row.line,
                format!(
                    "this row is {}, but the first row of the data set is {}; all rows must be of \
                     one kind",
                    row.record.kind(),
                    self.kind
                ),
            ));
        }
        let example = self.example(&row.record);
        let mut example = example.map_err(|error| error.in_row(&row.path, row.line))?;
        self.check_bos(row, &example)?;
        if let Some(classes) = &self.options.classes {
            let number = classes.number(row.label.as_ref());
            let number = number.map_err(|message| Error::data(&row.path, row.line, message))?;
            Classes::mark(&mut example, number);
        }
        Ok(example)
    }

    fn example(&self, record: &Record) -> Result<Example> {
        match record {
            Record::Text(text) => {
                let text = self.with_eos(text);
                Ok(fully_trained(
                    self.tokenizer.encode(&text, SpecialTokens::Add)?,
                ))
            }
            Record::PromptCompletion { prompt, completion } => {
                let text = format!("{prompt}{}", self.with_eos(completion));
                if !self.mask_prompt {
                    return Ok(fully_trained(
                        self.tokenizer.encode(&text, SpecialTokens::Add)?,
                    ));
                }
                let encoded = self
                    .tokenizer
                    .encode_with_offsets(&text, SpecialTokens::Add)?;
                let begin = completion_start(&encoded, prompt.len());
                Ok(masked(encoded.ids, |i| i >= begin))
            }
            Record::Messages { messages, inputs } => {
                self.check_roles(messages, inputs)?;
                let rendered = self.render(messages, inputs, Ending::Closed)?;
                self.conversation(messages, inputs, &rendered, 0)
            }
            Record::Tokens { input_ids, labels } => {
                self.check_ids("input_ids", input_ids.iter().copied())?;
                let labels_of_tokens = labels.iter().filter_map(|&l| u32::try_from(l).ok());
                self.check_ids("labels", labels_of_tokens)?;
                Ok(Example {
                    input_ids: input_ids.clone(),
                    labels: labels.clone(),
                })
            }
            Record::PromptCompletionMessages {
                prompt,
                completion,
                inputs,
            } => self.prompt_completion(prompt, completion, inputs),
        }
    }

    /// Refuses a token id that the model has no row for.
    fn check_ids(&self, column: &str, mut ids: impl Iterator<Item = u32>) -> Result<()> {
        let size = self.options.vocab_size;
        let size = size.unwrap_or_else(|| self.tokenizer.vocab_size());
        let Some(id) = ids.find(|&id| id as usize >= size) else {
            return Ok(());
        };
        let message = format!(
            "`{column}` holds the token id {id}, and the vocabulary has {size} ids, 0 to {}; these rows were \
             tokenised for another model",
            size.saturating_sub(1)
        );
        Err(Error::config(column, message))
    }

    /// Text that ends with the EOS token, once; as it is where its class is learned.
    fn with_eos(&self, text: &str) -> String {
        if text.ends_with(self.eos) || self.options.classes.is_some() {
            text.to_owned()
        } else {
            format!("{text}{}", self.eos)
        }
    }

    fn check_roles(&self, messages: &[Message], inputs: &TemplateInputs) -> Result<()> {
        let render = |messages: &[Message]| self.render(messages, inputs, Ending::Closed).ok();
        roles::check(messages, render).map_err(|message| Error::Template { message })
    }

    fn render(
        &self,
        messages: &[Message],
        inputs: &TemplateInputs,
        ending: Ending,
    ) -> Result<Rendered> {
        let mut variables = self.options.chat_template_kwargs.clone();
        variables.extend(inputs.chat_template_kwargs.clone());
        let tools = inputs.tools.as_ref();
        self.template(tools)?.render(&Conversation {
            messages,
            tools,
            variables: &variables,
            ending,
        })
    }

    fn prompt_completion(
        &self,
        prompt: &[Message],
        completion: &[Message],
        inputs: &TemplateInputs,
    ) -> Result<Example> {
        let all = [prompt, completion].concat();
        self.check_roles(&all, inputs)?;
        let rendered = self.render(&all, inputs, Ending::Closed)?;
        if !self.mask_prompt {
            return self.conversation(&all, inputs, &rendered, 0);
        }
        let given = self.render(prompt, inputs, Ending::GenerationPrompt)?.text;
        if !rendered.text.starts_with(&given) {
            let same = given.char_indices().zip(rendered.text.chars());
            let common = same.take_while(|((_, a), b)| a == b).count();
            let from = |text: &str| excerpt(text.chars().skip(common));
            return Err(Error::Template {
                message: format!(
                    "the template renders the prompt differently when the completion follows \
                     (from character {common} on: `{}` against `{}`), so the completion cannot be \
                     told from the prompt; use `messages`, or set `completion_only_loss: false`",
                    from(&given),
                    from(&rendered.text)
                ),
            });
        }
        self.conversation(&all, inputs, &rendered, given.len())
    }

    /// A rendered conversation whose first `given` bytes are not trained.
    fn conversation(
        &self,
        messages: &[Message],
        inputs: &TemplateInputs,
        rendered: &Rendered,
        given: usize,
    ) -> Result<Example> {
        let in_part = inputs.trained.is_some() || self.options.assistant_only_loss;
        if given == 0 && !in_part {
            let ids = self.tokenizer.encode(&rendered.text, SpecialTokens::Omit)?;
            return Ok(fully_trained(ids));
        }
        let encoded = self
            .tokenizer
            .encode_with_offsets(&rendered.text, SpecialTokens::Omit)?;
        let begin = completion_start(&encoded, given);
        let trained = if in_part {
            let spans = self.trained_spans(messages, inputs, rendered, &encoded)?;
            Some(mask_of_spans(&encoded, &spans))
        } else {
            None
        };
        Ok(masked(encoded.ids, |i| {
            i >= begin && trained.as_ref().is_none_or(|mask| mask[i])
        }))
    }

    /// The bytes that are trained where not all are: what the assistant wrote, or what the row says.
    fn trained_spans(
        &self,
        messages: &[Message],
        inputs: &TemplateInputs,
        rendered: &Rendered,
        encoded: &Encoded,
    ) -> Result<Vec<Range<usize>>> {
        let assistant = self.assistant_spans(messages, inputs, rendered, encoded)?;
        let Some(turns) = inputs.trained else {
            return Ok(assistant);
        };
        let render = |messages: &[Message]| {
            let rendered = self.render(messages, inputs, Ending::Closed)?;
            Ok(rendered.text)
        };
        let text = (rendered.text.as_str(), self.tokenizer.eos_token());
        instructlab::trained_spans(turns, assistant, messages, text, render)
    }

    /// The bytes that the assistant wrote, as the template's tags say or its renderings show.
    fn assistant_spans(
        &self,
        messages: &[Message],
        inputs: &TemplateInputs,
        rendered: &Rendered,
        encoded: &Encoded,
    ) -> Result<Vec<Range<usize>>> {
        if self.template(inputs.tools.as_ref())?.has_generation_tags() {
            return Ok(rendered.assistant_spans.clone());
        }
        let render = |messages: &[Message], ending| {
            self.render(messages, inputs, ending)
                .map(|rendered| rendered.text)
        };
        Untagged {
            messages,
            text: &rendered.text,
            encoded,
            tokenizer: self.tokenizer,
            render,
        }
        .spans()
    }

    fn check_bos(&self, row: &Row, example: &Example) -> Result<()> {
        match (self.tokenizer.bos_id(), example.input_ids.as_slice()) {
            (Some(bos), [first, second, ..]) if *first == bos && *second == bos => {
                Err(Error::data(
                    &row.path,
                    row.line,
                    format!(
                        "the row begins with two `{0}` tokens: its text already holds `{0}` and \
                         the tokenizer or template adds another; remove it from the text, or use \
                         the `messages` column",
                        self.tokenizer
                            .special_tokens()
                            .get("bos_token")
                            .map_or("", String::as_str)
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    /// Cuts an example to `max_length`; how many tokens went.
    pub fn truncate(&self, example: &mut Example) -> usize {
        let Some(lost) = self
            .options
            .max_length
            .and_then(|max| example.len().checked_sub(max))
        else {
            return 0;
        };
        let kept = match self.options.truncation_mode {
            TruncationMode::KeepStart => 0..example.len() - lost,
            TruncationMode::KeepEnd => lost..example.len(),
        };
        if lost > 0 {
            let last = example.labels.last().copied();
            example.input_ids = example.input_ids[kept.clone()].to_vec();
            example.labels = example.labels[kept].to_vec();
            if let (Some(_), Some(class), Some(label)) =
                (&self.options.classes, last, example.labels.last_mut())
            {
                *label = class;
            }
        }
        lost
    }
}

/// The first token that covers anything beyond `boundary` bytes. A token across the boundary
/// belongs to the completion: it cannot be given without giving away part of it.
fn completion_start(encoded: &Encoded, boundary: usize) -> usize {
    if boundary == 0 {
        return encoded.offsets.iter().position(|o| o.1 > 0).unwrap_or(0);
    }
    encoded
        .offsets
        .iter()
        .position(|offsets| offsets.1 > boundary)
        .unwrap_or(encoded.ids.len())
}

fn fully_trained(ids: Vec<u32>) -> Example {
    masked(ids, |_| true)
}

fn masked(input_ids: Vec<u32>, trained: impl Fn(usize) -> bool) -> Example {
    let label = |(i, id): (usize, &u32)| if trained(i) { *id as i32 } else { IGNORE_INDEX };
    Example {
        labels: input_ids.iter().enumerate().map(label).collect(),
        input_ids,
    }
}
