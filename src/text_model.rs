//! A model that is ready to answer: base, adapter and tokenizer together.

use crate::device::activation_dtype;
use crate::generate::{GenerateOptions, generate};
use ferrotune_core::Result;
use ferrotune_core::data::{Decoding, Prompt, Tokenizer};
use ferrotune_core::io::{FileDType, ModelFiles};
use ferrotune_core::model::{
    DecoderConfig, LoadedBase, Mode, Model, ModelPlan, Pass, Quantise, WeightFormat,
};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_core::trainer::attach;
use ferrotune_kernels::{DType, Device, Workspace};
use ferrotune_lora::AdapterBase;
use std::path::{Path, PathBuf};

/// A base model with or without an adapter, and its tokenizer.
#[derive(Debug)]
pub struct TextModel {
    /// Directory of the base.
    pub base: PathBuf,
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
    /// Reads the model in `base` (merged or not) and the adapter in `adapter`, to answer on the CPU.
    ///
    /// Weights stay in the dtype of their files, f32 or bf16.
    ///
    /// # Errors
    /// [`Error::Model`] or [`Error::Adapter`] naming the file and the tensor or key that does not
    /// fit; [`Error::Read`].
    ///
    /// [`Error::Model`]: ferrotune_core::Error::Model
    /// [`Error::Adapter`]: ferrotune_core::Error::Adapter
    /// [`Error::Read`]: ferrotune_core::Error::Read
    pub fn load(base: &Path, adapter: Option<&Path>) -> Result<Self> {
        Self::load_on(&Device::Cpu, base, adapter)
    }

    /// [`TextModel::load`], to answer on `device`.
    ///
    /// # Errors
    /// As there, or a failure of the device.
    pub fn load_on(device: &Device, base: &Path, adapter: Option<&Path>) -> Result<Self> {
        Self::load_as(device, base, adapter, None)
    }

    /// [`TextModel::load_on`] with the linears of the base quantised, if asked for, as an adapter was
    /// trained over them.
    ///
    /// # Errors
    /// As there.
    pub fn load_as(
        device: &Device,
        base: &Path,
        adapter: Option<&Path>,
        quantise: Option<Quantise>,
    ) -> Result<Self> {
        let config = DecoderConfig::open(base)?;
        let files = ModelFiles::open(base)?;
        let format = WeightFormat {
            dtype: dtype_of(&files),
            quantise,
        };
        let (model, params) = match adapter {
            Some(directory) => {
                let method = ferrotune_lora::load(directory, &config.model_type)?;
                let config = method
                    .decoder(config)
                    .map_err(|e| e.of_adapter(directory))?;
                let (attachments, mut params) =
                    attach(&config, method.as_ref()).map_err(|e| e.of_adapter(directory))?;
                params.move_to(device);
                let sites = ModelPlan::new(&config).sites;
                let source = AdapterBase::new(&files, directory, &sites, params.layout())?;
                let mut model = Model::load(&config, attachments, &source, &mut params, format)?;
                let mut loaded = LoadedBase {
                    model: &mut model,
                    source: &source,
                };
                method.prepare(&mut params, &mut loaded)?;
                method.load(&mut params, directory)?;
                (model, params)
            }
            None => {
                let mut params = FlatBuffer::zeros_on(&ParamLayoutBuilder::new().build()?, device);
                let model = Model::load(&config, Vec::new(), &files, &mut params, format)?;
                (model, params)
            }
        };
        let own_tokenizer = adapter.filter(|d| d.join("tokenizer.json").is_file());
        let tokenizer = Tokenizer::from_dir(own_tokenizer.unwrap_or(base))?;
        Ok(Self {
            base: base.into(),
            model,
            params,
            tokenizer,
            workspace: Workspace::on(device.clone(), 0),
        })
    }

    /// A pass without random draws: f32 activations on a CPU, the dtype of the weights on a GPU.
    #[must_use]
    pub fn pass(&self) -> Pass<'_> {
        Pass {
            workspace: &self.workspace,
            dtype: activation_dtype(self.model.device(), self.model.weight_dtype()),
            mode: Mode::Eval,
        }
    }

    /// What a person types: the user's message where there is a chat template, plain text otherwise.
    #[must_use]
    pub fn prompt(&self, text: &str) -> Prompt {
        match self.tokenizer.chat_template(None) {
            Some(_) => Prompt::user(text),
            None => Prompt::Text(text.to_owned()),
        }
    }

    /// Token ids of a prompt, as training showed it.
    ///
    /// # Errors
    /// As [`Prompt::encode`].
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        prompt.encode(&self.tokenizer)
    }

    /// Checks that the embedding has a row for every token id.
    ///
    /// # Errors
    /// [`Error::Model`](ferrotune_core::Error::Model) naming the tokenizer's file and the model's, the
    /// largest id and the size of the vocabulary.
    pub fn check_vocabulary<'a>(&self, ids: impl IntoIterator<Item = &'a u32>) -> Result<()> {
        let vocab_size = self.model.config().vocab_size;
        self.tokenizer
            .check_fits(ids, vocab_size, &self.base.join("config.json"))
    }

    /// The answer to each prompt of token ids (see [`TextModel::encode`]), special tokens left out.
    ///
    /// Where `options` name no stop tokens, the tokenizer's are used.
    ///
    /// # Errors
    /// As [`TextModel::check_vocabulary`] and [`generate`].
    pub fn answer(&self, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<Vec<String>> {
        self.check_vocabulary(prompts.iter().flatten())?;
        let mut options = options.clone();
        if options.stop_ids.is_empty() {
            options.stop_ids = self.tokenizer.stop_ids().to_vec();
        }
        let answers = generate(&self.model, &self.params, self.pass(), prompts, &options)?;
        let decode = |ids: &Vec<u32>| self.tokenizer.decode(ids, Decoding::SkipSpecialTokens);
        answers.iter().map(decode).collect()
    }
}

fn dtype_of(files: &ModelFiles) -> DType {
    let is_bf16 = |name: &str| files.meta(name).is_some_and(|m| m.dtype == FileDType::BF16);
    if files.names().any(is_bf16) {
        DType::Bf16
    } else {
        DType::F32
    }
}
