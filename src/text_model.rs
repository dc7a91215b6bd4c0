//! A model that is ready to answer: base, adapter and tokenizer together.

use crate::generate::{GenerateOptions, generate};
use ferrotune_core::adapter::Adapter;
use ferrotune_core::data::{
    ChatTemplate, Conversation, Decoding, Ending, Message, SpecialTokens, Tokenizer,
};
use ferrotune_core::io::{FileDType, ModelFiles};
use ferrotune_core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_core::trainer::attach;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Workspace};
use std::path::Path;

/// A base model with or without an adapter, and its tokenizer.
#[derive(Debug)]
pub struct TextModel {
    /// The base, with the adapter's attachments in place.
    pub model: Model,
    /// The adapter's values; empty without one.
    pub params: FlatBuffer,
    /// The adapter's own tokenizer if it has one, because that is the one it was trained with;
    /// the base's otherwise.
    pub tokenizer: Tokenizer,
    /// Pool of activation buffers.
    pub workspace: Workspace,
}

impl TextModel {
    /// Reads the model in `base` (merged or not) and the adapter in `adapter`.
    ///
    /// Weights stay in the dtype of their files, f32 or bf16.
    ///
    /// # Errors
    /// [`Error::Model`] or [`Error::Adapter`] naming the file and the tensor or key that does not
    /// fit; [`Error::Read`].
    pub fn load(base: &Path, adapter: Option<&Path>) -> Result<Self> {
        let config = DecoderConfig::open(base)?;
        let files = ModelFiles::open(base)?;
        let (model, params) = match adapter {
            Some(directory) => {
                let method = ferrotune_lora::load(directory, &config.model_type)?;
                with_adapter(&config, &files, method.as_ref(), directory)?
            }
            None => {
                let mut params = FlatBuffer::zeros(&ParamLayoutBuilder::new().build()?);
                let dtype = dtype_of(&files);
                let model = Model::load(&config, Vec::new(), &files, &mut params, dtype)?;
                (model, params)
            }
        };
        let own_tokenizer = adapter.filter(|d| d.join("tokenizer.json").is_file());
        let tokenizer = Tokenizer::from_dir(own_tokenizer.unwrap_or(base))?;
        Ok(Self {
            model,
            params,
            tokenizer,
            workspace: Workspace::new(0),
        })
    }

    /// A pass without random draws, with f32 activations.
    #[must_use]
    pub fn pass(&self) -> Pass<'_> {
        Pass {
            workspace: &self.workspace,
            dtype: DType::F32,
            mode: Mode::Eval,
        }
    }

    /// Token ids of a conversation that waits for its answer: through the chat template where
    /// there is one, else as plain text, one message per line.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses the messages.
    pub fn encode(&self, messages: &[Message]) -> Result<Vec<u32>> {
        match self.tokenizer.chat_template(None) {
            Some(template) => {
                let text = render(template, messages)?;
                self.tokenizer.encode(&text, SpecialTokens::Omit)
            }
            None => {
                let text = messages
                    .iter()
                    .filter_map(|m| m.content()?.as_str())
                    .collect::<Vec<_>>()
                    .join("\n");
                self.tokenizer.encode(&text, SpecialTokens::Add)
            }
        }
    }

    /// The answer to each prompt of token ids (see [`TextModel::encode`]), special tokens left out.
    ///
    /// Where `options` name no stop tokens, the tokenizer's are used.
    ///
    /// # Errors
    /// As [`generate`].
    pub fn answer(&self, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<Vec<String>> {
        let mut options = options.clone();
        if options.stop_ids.is_empty() {
            options.stop_ids = self.tokenizer.stop_ids().to_vec();
        }
        let answers = generate(&self.model, &self.params, self.pass(), prompts, &options)?;
        let decode = |ids: &Vec<u32>| self.tokenizer.decode(ids, Decoding::SkipSpecialTokens);
        answers.iter().map(decode).collect()
    }
}

fn with_adapter(
    config: &DecoderConfig,
    files: &ModelFiles,
    adapter: &dyn Adapter,
    directory: &Path,
) -> Result<(Model, FlatBuffer)> {
    let (attachments, mut params) = attach(config, adapter)?;
    let model = Model::load(config, attachments, files, &mut params, dtype_of(files))?;
    adapter.load(&mut params, directory)?;
    Ok((model, params))
}

fn dtype_of(files: &ModelFiles) -> DType {
    let is_bf16 = |name: &str| files.meta(name).is_some_and(|m| m.dtype == FileDType::BF16);
    if files.names().any(is_bf16) {
        DType::Bf16
    } else {
        DType::F32
    }
}

fn render(template: &ChatTemplate, messages: &[Message]) -> Result<String, Error> {
    let conversation = Conversation {
        messages,
        tools: None,
        variables: &serde_json::Map::new(),
        ending: Ending::GenerationPrompt,
    };
    Ok(template.render(&conversation)?.text)
}
