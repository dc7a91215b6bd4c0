//! The port that PEFT methods implement: where they attach and what they do there.

mod merge;
mod penalty;
mod prompt;
mod update;

pub use penalty::Penalty;
pub use prompt::{Prompt, PromptOf};
pub use update::{CustomLinear, LowRankFactors, WeightUpdate};

use crate::Result;
use crate::model::DecoderConfig;
use crate::params::{FlatBuffer, ParamId, ParamLayoutBuilder};
use ferrotune_kernels::{Tensor, View};
use std::fmt::Debug;
use std::path::Path;

/// A place in the model where a method can attach. Index into [`Site::id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId(pub usize);

/// What stands at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SiteKind {
    /// `y = x W^T (+ b)`, W `[out_features, in_features]`.
    Linear,
    /// Rows of a table `[out_features = vocabulary, in_features = hidden]`.
    Embedding,
    /// A norm weight `[out_features]`.
    Norm,
}

/// Heads of the keys, and as many of the values, of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyHeads {
    /// How many.
    pub heads: usize,
    /// Columns of one.
    pub head_dim: usize,
}

/// A site, known before any weight is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Its index.
    pub id: SiteId,
    /// Module path in the Hugging Face model, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Module path under which files have its weights: `name`, but for a layer of a stack made anew
    /// ([`DecoderConfig::stacked`]), where several sites may have one.
    pub stored_name: String,
    /// What stands there.
    pub kind: SiteKind,
    /// Columns of the weight; 1 for a norm.
    pub in_features: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// Whether the base has a bias here.
    pub bias: bool,
    /// Whether files hold the weight as `[in_features, out_features]`, as GPT-2's do. In memory, and to
    /// adapters, it is `[out_features, in_features]` like all others.
    pub stored_transposed: bool,
    /// The heads of attention's keys, where it is the linear that makes them.
    pub keys: Option<KeyHeads>,
    /// Decoder layer, if it is in one.
    pub layer: Option<usize>,
    /// Whether it is the output head (PEFT's `all-linear` leaves that one out).
    pub output_head: bool,
    /// The site whose weight it shares, for a head tied to the embedding.
    pub tied_to: Option<SiteId>,
    /// When forward uses it: smaller is earlier.
    pub execution_order: usize,
}

impl Site {
    /// Name of its tensor `weight` or `bias` in files.
    #[must_use]
    pub fn tensor(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.stored_name)
    }
}

/// What a method does at one site.
#[derive(Debug)]
pub enum Attachment {
    /// `y += scale * (dropout(x) A^T B^T + b)`, folded into the linear's own products; on an embedding
    /// `y += scale * B[ids] A`, on the head `logits += scale * dropout(x) A^T B^T`.
    LowRank(LowRank),
    /// A low-rank update whose factors the method makes of its parameters, folded in the same way.
    Factors(Box<dyn LowRankFactors>),
    /// The base weight is replaced by a function of it and of the method's parameters.
    Weight(Box<dyn WeightUpdate>),
    /// The base weight (and bias) itself is trained, starting from the base's values. A head tied to
    /// an embedding follows it, unless something stands at the head itself.
    TrainBase {
        /// Weight, same shape as the base's.
        weight: ParamId,
        /// Bias, if the base has one.
        bias: Option<ParamId>,
    },
    /// The base's bias is trained, starting from its values, beside whatever else stands at the site.
    TrainBias(ParamId),
    /// Some rows of an embedding, or of a head that is not tied, are trained, starting from the base's
    /// values. A head tied to the embedding has the same rows.
    TrainRows {
        /// `[rows, in_features]`.
        rows: ParamId,
        /// The token of each row: distinct, each below `out_features`.
        indices: Vec<u32>,
    },
    /// The base's weight as it is, on a head tied to an embedding that is trained.
    KeepBase,
    /// Rows before every document, at the embedding.
    Prompt(Prompt),
    /// Where low-rank updates of linears inside the layers act, at the embedding: from the last occurrence of these
    /// tokens in a document on.
    Invocation(Vec<u32>),
    /// Anything else on a linear, with its own forward and backward.
    Custom(Box<dyn CustomLinear>),
}

/// A low-rank update of a linear.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRank {
    /// A, `[rank, in_features]`.
    pub a: ParamId,
    /// B, `[out_features, rank]`.
    pub b: ParamId,
    /// Rank.
    pub rank: usize,
    /// Factor of the update: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    pub scale: f32,
    /// Probability that an element of x is dropped before A, in training; without effect on an
    /// embedding, whose ids cannot be dropped.
    pub dropout: f32,
    /// DoRA's m: what rows or columns of W + scale * B A are brought to.
    pub magnitude: Option<Magnitude>,
    /// b, `[out_features]`, on a linear or the head.
    pub bias: Option<ParamId>,
}

/// DoRA's m, one norm per feature of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Magnitude {
    /// `[out_features]`: row i of a linear's weight is brought to the norm m\[i\].
    OfRows(ParamId),
    /// `[in_features]`: column i of a table is.
    OfColumns(ParamId),
}

impl Magnitude {
    /// m.
    #[must_use]
    pub fn id(self) -> ParamId {
        match self {
            Self::OfRows(id) | Self::OfColumns(id) => id,
        }
    }
}

/// The linears of a loaded base, as a method sees and changes them.
pub trait BaseWeights {
    /// The site of the module called `name`.
    fn find(&self, name: &str) -> Option<SiteId>;

    /// W `[out_features, in_features]` of a linear, or of a table that is looked up, f32 in host memory.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if no frozen linear or table stands at the site.
    fn read(&self, site: SiteId) -> Result<Tensor>;

    /// Rows of the embedding; 0 where that is not at hand.
    fn vocabulary(&self) -> usize;

    /// The rows of `tokens` as the embedding gives them, `[tokens, hidden]`, f32 in host memory.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if a token lies outside the vocabulary, or the embedding is not at hand.
    fn embed(&self, tokens: &[u32]) -> Result<Tensor>;

    /// Bits of a code where W is held as codes, so that [`BaseWeights::read`] gives what they stand for.
    fn code_bits(&self, site: SiteId) -> Option<usize> {
        let _ = site;
        None
    }

    /// W as the files of a base have it that is held as codes of it.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if they have codes too, or are not at hand.
    fn original(&self, site: SiteId) -> Result<Tensor> {
        let _ = site;
        let message =
            "needs the weights that the quantised base was made of, and there are none at hand";
        Err(crate::Error::config("init_lora_weights", message))
    }

    /// Replaces W, rounded or quantised to what the base is held in.
    ///
    /// # Errors
    /// As [`BaseWeights::read`], or if the format cannot be made here.
    fn replace(&mut self, site: SiteId, weight: View<'_>) -> Result<()>;
}

/// An optimizer step that was just made, as a method sees it.
#[derive(Debug)]
pub struct StepDone<'a> {
    /// Steps before it.
    pub step: u64,
    /// The gradient, a sum over the step's trained tokens.
    pub grads: &'a FlatBuffer,
    /// What the optimizer multiplied it with: clipping over the number of tokens.
    pub grad_scale: f32,
    /// The method's [`Adapter::state`], in its order.
    pub state: &'a mut [FlatBuffer],
}

/// A PEFT method over a whole model.
pub trait Adapter: Debug + Send + Sync {
    /// The model that the method works on: `base`, or one made of its layers. What is attached to and
    /// loaded is this model.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if it cannot be made of `base`.
    fn decoder(&self, base: DecoderConfig) -> Result<DecoderConfig> {
        Ok(base)
    }

    /// Bytes of the tensors that nobody trains and all targets share, once it is attached.
    fn frozen_bytes(&self) -> u64 {
        0
    }

    /// Bytes of those that [`Adapter::save`] writes too.
    fn saved_frozen_bytes(&self) -> u64 {
        0
    }

    /// Declares what is trained and where it attaches, from names and shapes alone.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if a pattern matches nothing, with the nearest names.
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>>;

    /// Values that follow from the base's weights, and changes to the base that belong to the method.
    /// Called once when the base is there: after [`Adapter::init`], before [`Adapter::load`].
    ///
    /// # Errors
    /// If a value cannot be computed.
    fn prepare(&self, params: &mut FlatBuffer, base: &mut dyn BaseWeights) -> Result<()> {
        let _ = (params, base);
        Ok(())
    }

    /// Fills the parameters with the method's initial values, a pure function of `seed`.
    ///
    /// Parameters that start from the base's values hold them already.
    ///
    /// # Errors
    /// If a value cannot be computed.
    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()>;

    /// Hears of the length of the run, for methods with a schedule. Called before anything else.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if the schedule does not fit into it.
    fn plan_steps(&mut self, total_steps: u64) -> Result<()> {
        let _ = total_steps;
        Ok(())
    }

    /// Names of what the method remembers from step to step: buffers of the parameters' layout, zero at
    /// first, that checkpoints hold beside AdamW's moments.
    fn state(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether [`Adapter::complete_gradients`] is to be called.
    fn completes_gradients(&self) -> bool {
        false
    }

    /// Has the last word on the gradient of a step, once it is summed over all micro-batches and ranks.
    ///
    /// A term of the objective beside the mean loss over the data is returned, to be read after the update, and `weight`
    /// times its gradient added to `grads`. The gradient of values that the method makes of its parameters is turned into theirs.
    ///
    /// # Errors
    /// If a value cannot be computed.
    fn complete_gradients(
        &self,
        params: &FlatBuffer,
        weight: f32,
        grads: &mut FlatBuffer,
    ) -> Result<Penalty> {
        let _ = (params, weight, grads);
        Ok(Penalty::default())
    }

    /// Whether [`Adapter::precondition`] is to be called.
    fn preconditions(&self) -> bool {
        false
    }

    /// Makes of the mean gradient of a step, summed over ranks and clipped, the one that the optimizer gets.
    ///
    /// # Errors
    /// If a value cannot be computed.
    fn precondition(&self, params: &FlatBuffer, grads: &mut FlatBuffer) -> Result<()> {
        let _ = (params, grads);
        Ok(())
    }

    /// Changes the parameters after an optimizer step, in the same way on every rank.
    ///
    /// # Errors
    /// If a value cannot be computed.
    fn after_step(&self, params: &mut FlatBuffer, done: StepDone<'_>) -> Result<()> {
        let _ = (params, done);
        Ok(())
    }

    /// Clears what has no effect and would only take room in the result. Called when training is over.
    fn finish(&self, params: &mut FlatBuffer) {
        let _ = params;
    }

    /// Writes the method's files (for PEFT: `adapter_config.json`, `adapter_model.safetensors`), if `params` can be
    /// read ([`FlatBuffer::read_back`]).
    ///
    /// # Errors
    /// [`crate::Error::Write`]; the first failure of the GPU, before a file is touched.
    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()>;

    /// Reads what [`Adapter::save`] wrote, strictly: every tensor of the file must land, every
    /// parameter must be found.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] naming the file and the tensor.
    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()>;

    /// Short name for logs and model cards, such as `LoRA r=16 alpha=32`.
    fn describe(&self) -> String;
}
