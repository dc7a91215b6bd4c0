//! A model that is ready to answer: base, adapters and tokenizer together.

mod adapters;

use crate::device::activation_dtype;
use crate::generate::{GenerateOptions, Question, Voice, generate};
use ferrotune_core::data::{Decoding, PackedBatch, Prompt, Tokenizer};
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::{
    Classifier, DecoderConfig, HfConfig, LoadedBase, MemberPass, Mode, Model, ModelPlan, NewHead,
    Pass, Quantise, RandomWeights, WeightFormat, WeightSource,
};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::trainer::attach;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::linear_cross_entropy::{Accumulator, Sums};
use ferrotune_kernels::{Device, Tensor, Workspace};
use ferrotune_lora::AdapterBase;
use std::path::{Path, PathBuf};

/// A base model with an adapter, with several, or without, and its tokenizer.
///
/// One adapter of any kind: [`TextModel::load`]. Several over one base, which can be added, exchanged and taken away
/// while the base stays where it is: [`TextModel::load_together`].
#[derive(Debug)]
pub struct TextModel {
    /// Directory of the base.
    pub base: PathBuf,
    /// The base, with what adapters attach in place.
    pub model: Model,
    /// Pool of activation buffers.
    pub workspace: Workspace,
    /// Whether adapters are beside one another, and none is part of the model.
    together: bool,
    /// At least one: without an adapter, the base.
    adapters: Vec<Loaded>,
    /// Which of them is meant where none is named.
    active: usize,
}

/// An adapter that is ready, or the base alone.
#[derive(Debug)]
struct Loaded {
    name: String,
    /// Its number among several.
    number: Option<usize>,
    params: FlatBuffer,
    /// Its own if it has one, because that is the one it was trained with; the base's otherwise.
    tokenizer: Tokenizer,
}

impl Loaded {
    fn voice(&self) -> Voice<'_> {
        Voice {
            adapter: self.number,
            params: &self.params,
            stop_ids: self.tokenizer.stop_ids(),
        }
    }
}

impl TextModel {
    /// Reads the model in `base` (merged or not) and the adapter in `adapter`, to answer on the CPU.
    ///
    /// Weights stay in the dtype of their files, f32 or bf16.
    ///
    /// # Errors
    /// [`Error::Model`] or [`Error::Adapter`] naming the file and the tensor or key that does not
    /// fit; [`Error::Read`].
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
        let config = config_of(base, adapter)?;
        let files = ModelFiles::open(base)?;
        let format = WeightFormat {
            dtype: files.dtype(),
            quantise,
        };
        let (model, params) = match adapter {
            Some(directory) => {
                let method = ferrotune_lora::load(directory, &config)?;
                let config = method
                    .decoder(config)
                    .map_err(|e| e.of_adapter(directory))?;
                let (attachments, mut params) =
                    attach(&config, method.as_ref()).map_err(|e| e.of_adapter(directory))?;
                params.move_to(device);
                let sites = ModelPlan::new(&config).sites;
                let own = AdapterBase::new(&files, directory, &sites, params.layout())?;
                let with_head = NewHead {
                    rest: &own,
                    head: RandomWeights { seed: 0 },
                };
                // What is drawn is the adapter's before anything reads it.
                let source: &dyn WeightSource = match NewHead::is_needed(&config, &files) {
                    true => &with_head,
                    false => &own,
                };
                let mut model = Model::load(&config, attachments, source, &mut params, format)?;
                let mut loaded = LoadedBase {
                    model: &mut model,
                    source,
                };
                method.prepare(&mut params, &mut loaded)?;
                method.load(&mut params, directory)?;
                (model, params)
            }
            None => {
                let mut params = FlatBuffer::empty_on(device);
                let model = Model::load(&config, Vec::new(), &files, &mut params, format)?;
                (model, params)
            }
        };
        let name = adapter.map_or_else(String::new, |d| d.display().to_string());
        let loaded = Loaded {
            name,
            number: None,
            params,
            tokenizer: tokenizer(base, adapter)?,
        };
        Ok(Self {
            base: base.into(),
            model,
            workspace: Workspace::on(device.clone(), 0),
            together: adapter.is_none(),
            adapters: vec![loaded],
            active: 0,
        })
    }

    /// Values of the active adapter; empty without one.
    #[must_use]
    pub fn params(&self) -> &FlatBuffer {
        &self.active().params
    }

    /// The tokenizer of the active adapter: its own if it has one, the base's otherwise.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.active().tokenizer
    }

    fn active(&self) -> &Loaded {
        &self.adapters[self.active]
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
        match self.tokenizer().chat_template(None) {
            Some(_) => Prompt::user(text),
            None => Prompt::Text(text.to_owned()),
        }
    }

    /// Token ids of a prompt, as training showed it.
    ///
    /// # Errors
    /// As [`Prompt::encode`].
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        prompt.encode(self.tokenizer())
    }

    /// Checks that the embedding has a row for every token id.
    ///
    /// # Errors
    /// [`Error::Model`] naming the tokenizer's file and the model's, the largest id and the size of the vocabulary.
    pub fn check_vocabulary<'a>(&self, ids: impl IntoIterator<Item = &'a u32>) -> Result<()> {
        let vocab_size = self.model.config().vocab_size;
        self.tokenizer()
            .check_fits(ids, vocab_size, &self.base.join("config.json"))
    }

    /// The losses of the trained tokens of `batch` with the active adapter.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary.
    pub fn loss(&self, batch: &PackedBatch) -> Result<Sums> {
        let (pass, adapter) = (self.pass(), self.active());
        let Some(number) = adapter.number else {
            return self.model.loss(pass, &adapter.params, batch);
        };
        let mut sums = Accumulator::new(self.model.device());
        let member = MemberPass {
            number,
            batch,
            params: &adapter.params,
            grads: &mut FlatBuffer::empty_on(self.model.device()),
            sums: &mut sums,
            mode: Mode::Eval,
            workspace: &self.workspace,
        };
        self.model
            .loss_of_member(&self.workspace, pass.dtype, member)?;
        Ok(sums.read()?)
    }

    /// Logits of every token of `batch`, `[T, V]` f32, of a model that was loaded with one adapter or none.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary; [`Error::Config`] for one of several adapters.
    pub fn logits(&self, batch: &PackedBatch) -> Result<Tensor> {
        let adapter = self.active();
        if adapter.number.is_some() {
            let message = "logits of every token are of one adapter that is loaded alone";
            return Err(Error::config("adapter", message));
        }
        self.model.logits(self.pass(), &adapter.params, batch)
    }

    /// What the active adapter answers to each prompt of token ids (see [`TextModel::encode`]), special tokens left
    /// out.
    ///
    /// Where `options` name no stop tokens, the tokenizer's are used.
    ///
    /// # Errors
    /// As [`TextModel::check_vocabulary`] and [`generate`].
    pub fn answer(&self, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<Vec<String>> {
        let question = |ids: &Vec<u32>| Question {
            voice: self.active,
            ids: ids.clone(),
        };
        let questions: Vec<Question> = prompts.iter().map(question).collect();
        self.answer_together(&questions, options)
    }

    /// [`TextModel::answer`] of several adapters at once, each question naming one by its place among
    /// [`TextModel::adapters`]. What an adapter answers does not depend on the others.
    ///
    /// # Errors
    /// As there.
    pub fn answer_together(
        &self,
        questions: &[Question],
        options: &GenerateOptions,
    ) -> Result<Vec<String>> {
        if self.model.config().classifier.is_some() {
            let message = "is a classifier, which says nothing; `eval` finds its loss and accuracy on rows with a `label`";
            return Err(Error::config("model", message));
        }
        self.check_vocabulary(questions.iter().flat_map(|question| &question.ids))?;
        let voices: Vec<Voice<'_>> = self.adapters.iter().map(Loaded::voice).collect();
        let answers = generate(&self.model, &voices, self.pass(), questions, options)?;
        let decode = |(ids, question): (&Vec<u32>, &Question)| {
            let tokenizer = &self.adapters[question.voice].tokenizer;
            tokenizer.decode(ids, Decoding::SkipSpecialTokens)
        };
        answers.iter().zip(questions).map(decode).collect()
    }
}

/// The model that `base` is for `adapter`: under that of a classifier, a language model gets its head.
fn config_of(base: &Path, adapter: Option<&Path>) -> Result<DecoderConfig> {
    let keys = HfConfig::open(base)?;
    let config = DecoderConfig::from_hf(&keys)?;
    let classes = adapter.map(ferrotune_lora::classes_of).transpose()?;
    match (config.classifier, classes.flatten()) {
        (None, Some(classes)) => Ok(config.with_classifier(Classifier::over(&keys, classes)?)),
        _ => Ok(config),
    }
}

/// The tokenizer of an adapter if it has one, else of the base.
fn tokenizer(base: &Path, adapter: Option<&Path>) -> Result<Tokenizer> {
    let own = adapter.filter(|directory| directory.join("tokenizer.json").is_file());
    Tokenizer::from_dir(own.unwrap_or(base))
}
