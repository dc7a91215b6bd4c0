//! A base model with or without an adapter, ready to answer: what `generate` and `eval` share.

use super::Failure;
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::{
    ChatTemplate, Conversation, Decoding, Ending, Message, SpecialTokens, Tokenizer,
};
use ferrotune::core::io::{FileDType, ModelFiles};
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune::core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune::core::trainer::attach;
use ferrotune::core::{Error, Result};
use ferrotune::generate::{GenerateOptions, generate};
use ferrotune::kernels::{DType, Workspace};
use std::path::{Path, PathBuf};

/// Arguments that choose the model.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ModelArgs {
    /// Directory of the model (merged or base)
    #[arg(long)]
    pub(super) model_name_or_path: PathBuf,
    /// Directory of an adapter on it
    #[arg(long)]
    pub(super) adapter: Option<PathBuf>,
}

/// Arguments that choose tokens.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SamplingArgs {
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// 0 always takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the k most likely tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Only the smallest set of tokens with this much probability
    #[arg(long)]
    top_p: Option<f64>,
    /// Seed of the draws
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Prompts that run together
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
}

impl SamplingArgs {
    pub(super) fn greedy(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens,
            temperature: 0.0,
            top_k: None,
            top_p: None,
            seed: 42,
            batch_size: 64,
        }
    }

    fn options(&self, stop_ids: &[u32]) -> Result<GenerateOptions, Failure> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(Failure::Usage(format!(
                "--temperature {}: expected 0 or more",
                self.temperature
            )));
        }
        if self.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return Err(Failure::Usage(
                "--top-p: expected a number above 0 and at most 1".into(),
            ));
        }
        if self.top_k == Some(0) {
            return Err(Failure::Usage("--top-k: expected 1 or more".into()));
        }
        Ok(GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            stop_ids: stop_ids.to_vec(),
            batch_size: self.batch_size,
        })
    }
}

/// A loaded model.
pub(super) struct Chat {
    pub(super) model: Model,
    pub(super) params: FlatBuffer,
    pub(super) tokenizer: Tokenizer,
    pub(super) workspace: Workspace,
}

impl Chat {
    pub(super) fn load(args: &ModelArgs) -> Result<Self> {
        let base = &args.model_name_or_path;
        let config = DecoderConfig::open(base)?;
        let files = ModelFiles::open(base)?;
        let bf16 = files
            .names()
            .any(|n| files.meta(n).is_some_and(|m| m.dtype == FileDType::BF16));
        let dtype = if bf16 { DType::Bf16 } else { DType::F32 };
        let adapter: Option<Box<dyn Adapter>> = match &args.adapter {
            Some(directory) => Some(ferrotune::lora::load(directory, &config.model_type)?),
            None => None,
        };
        let (attachments, mut params) = match &adapter {
            Some(adapter) => attach(&config, adapter.as_ref())?,
            None => (
                Vec::new(),
                FlatBuffer::zeros(&ParamLayoutBuilder::new().build()?),
            ),
        };
        let model = Model::load(&config, attachments, &files, &mut params, dtype)?;
        if let (Some(adapter), Some(directory)) = (&adapter, &args.adapter) {
            adapter.load(&mut params, directory)?;
        }
        let tokenizer = Tokenizer::from_dir(tokenizer_directory(args))?;
        Ok(Self {
            model,
            params,
            tokenizer,
            workspace: Workspace::new(0),
        })
    }

    pub(super) fn pass(&self) -> Pass<'_> {
        Pass {
            workspace: &self.workspace,
            dtype: DType::F32,
            mode: Mode::Eval,
        }
    }

    /// Token ids of a prompt: through the chat template where there is one, else as plain text.
    pub(super) fn encode(&self, messages: &[Message]) -> Result<Vec<u32>> {
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

    /// The answer to each prompt.
    pub(super) fn answer(
        &self,
        prompts: &[Vec<u32>],
        sampling: &SamplingArgs,
    ) -> Result<Vec<String>, Failure> {
        let options = sampling.options(self.tokenizer.stop_ids())?;
        let answers = generate(&self.model, &self.params, self.pass(), prompts, &options)?;
        let decode = |ids: &Vec<u32>| self.tokenizer.decode(ids, Decoding::SkipSpecialTokens);
        Ok(answers.iter().map(decode).collect::<Result<_>>()?)
    }
}

/// The adapter's own tokenizer if it has one: it is the one it was trained with.
fn tokenizer_directory(args: &ModelArgs) -> &Path {
    let with_tokenizer = args
        .adapter
        .as_deref()
        .filter(|d| d.join("tokenizer.json").is_file());
    with_tokenizer.unwrap_or(&args.model_name_or_path)
}

fn render(template: &ChatTemplate, messages: &[Message]) -> Result<String, Error> {
    let (tools, variables) = (None, &serde_json::Map::new());
    let conversation = Conversation {
        messages,
        tools,
        variables,
        ending: Ending::GenerationPrompt,
    };
    Ok(template.render(&conversation)?.text)
}
