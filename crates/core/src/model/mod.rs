//! The decoder: frozen base weights, attachments, and an explicit forward and backward.
//!
//! [`DecoderConfig`] says what the model is, [`ModelPlan`] which sites it has, [`Model`] holds the
//! weights. Trainable values live outside, in a [`FlatBuffer`]; the model is immutable.

mod activation;
mod ahead;
mod angles;
mod attached;
mod base;
mod changed;
mod classifier;
mod column_norms;
mod config;
mod decode;
mod frozen;
mod head;
mod hf_config;
mod inputs;
mod invocation;
mod keep;
mod layer;
mod linear;
mod modules;
mod norm;
mod offload;
mod padding;
mod plan;
mod planner;
mod positions;
mod prompt;
mod qk_norm;
mod residual;
mod room;
mod rope;
mod run;
mod saved;
mod stack;
mod together;
mod vocabulary;
mod weight_format;
mod weight_source;
mod weights;

pub use base::{LoadedBase, SharedBase};
pub use classifier::Classifier;
pub use config::{DecoderConfig, EmbeddingScale, NormKind, QkNorm};
pub(crate) use config::{activation, nearest_divisor, norm_eps};
pub use decode::{KvCache, MemberDocuments};
pub use hf_config::HfConfig;
pub use inputs::{InputShape, Inputs};
pub use keep::Keep;
pub use modules::ModuleNames;
pub use offload::offloadable;
pub use plan::{LayerPlan, ModelPlan};
pub use planner::{ActivationPlan, StepBytes, StepMemory, StepShape, Workload};
pub use rope::{RopeConfig, RopeScaling};
pub use run::{Mode, Pass};
pub use together::MemberPass;
pub use weight_format::{Quantise, WeightFormat};
pub use weight_source::{NewHead, RandomWeights, WeightSource};

use crate::Result;
use crate::adapter::{Attachment, Prompt, PromptOf, SiteId};
use crate::data::PackedBatch;
use crate::params::FlatBuffer;
use ahead::{Ahead, WriteAhead};
use angles::AngleTable;
use ferrotune_kernels::linear_cross_entropy::{Accumulator, Sums};
use ferrotune_kernels::{DType, Device, Tensor, ViewMut, axpby};
use head::{Head, HeadUpdate};
use invocation::Invocation;
use layer::Layer;
use linear::LinearGroup;
use norm::{Norm, Normed};
use offload::{Offload, Offloading};
use positions::Positions;
use prompt::EmbeddedPrompt;
use run::Run;
use saved::{LayerSaved, Stream};
use std::collections::BTreeMap;
use vocabulary::Embedding;

/// A decoder with its frozen weights.
#[derive(Debug)]
pub struct Model {
    config: DecoderConfig,
    device: Device,
    embedding: Embedding,
    /// Where they are learned.
    positions: Option<Positions>,
    prompt: Option<Prompt>,
    embedded_prompt: Option<EmbeddedPrompt>,
    invocation: Option<Invocation>,
    layers: Vec<Layer>,
    norm: Norm,
    head: Head,
    weight_dtype: DType,
    /// Of each layer.
    keep: Vec<Keep>,
    label_smoothing: f32,
    neftune_noise_alpha: f32,
    angles: AngleTable,
    /// In training, where that is wanted.
    write_ahead: Option<WriteAhead>,
    /// In training, where that is wanted.
    offload: Option<Offload>,
}

/// What forward keeps for backward.
struct Saved {
    /// Of the layers that backward reaches, in order.
    layers: Vec<LayerSaved>,
    /// After the last layer, before the final norm.
    stream: Stream,
}

/// Told during backward, from the last layer to the first that is trained: the gradients of this layer
/// and of everything after it have all that this pass adds to them.
pub type LayerDone<'a> = dyn FnMut(&mut FlatBuffer, usize) -> Result<()> + Send + 'a;

impl Model {
    /// Reads the weights of `config` from `source`, with `attachments` in place.
    ///
    /// Weights that an attachment trains go into `params`; all others are kept as `format` says (a
    /// [`DType`] alone: as values of it), on the device of `params`.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if the weights do not fit the config, before any is read.
    pub fn load(
        config: &DecoderConfig,
        attachments: Vec<(SiteId, Attachment)>,
        source: &dyn WeightSource,
        params: &mut FlatBuffer,
        format: impl Into<WeightFormat>,
    ) -> Result<Self> {
        let plan = ModelPlan::new(config);
        let (mut alone, mut trained_biases) = (BTreeMap::new(), BTreeMap::new());
        let (mut prompt, mut invocation) = (None, None);
        for (site, attachment) in attachments {
            match attachment {
                Attachment::TrainBias(id) => drop(trained_biases.insert(site, id)),
                Attachment::Prompt(rows) => prompt = Some(rows),
                Attachment::Invocation(tokens) => invocation = Some(tokens),
                other => drop(alone.insert(site, other)),
            }
        }
        let device = params.device();
        let invocation = invocation.map(|tokens| Invocation::new(tokens, &alone, device));
        weights::Builder {
            config,
            plan: &plan,
            invocation,
            attachments: alone,
            trained_biases,
            prompt,
            source,
            params,
            format: format.into(),
            held: weights::Held::default(),
        }
        .model()
    }

    /// What the model is.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Dtype of the frozen weights in products.
    #[must_use]
    pub fn weight_dtype(&self) -> DType {
        self.weight_dtype
    }

    /// What each layer keeps for its backward; at first [`Keep::All`].
    #[must_use]
    pub fn keep(&self) -> &[Keep] {
        &self.keep
    }

    /// The virtual tokens before every document, if there are any.
    #[must_use]
    pub fn prompt(&self) -> Option<&Prompt> {
        self.prompt.as_ref()
    }

    /// Tokens of `batch` whose prediction is trained on: the first one of a document, which nothing else
    /// predicts, behind a prompt of embeddings too.
    #[must_use]
    pub fn trained_tokens(&self, batch: &PackedBatch) -> usize {
        if let Some(classifier) = &self.config.classifier {
            return classifier.targets(batch).0.len();
        }
        let first = match self.prompt {
            Some(prompt) if prompt.of == PromptOf::Embeddings => batch.trained_first_tokens(),
            _ => 0,
        };
        batch.trained_tokens() + first
    }

    /// Sets the share of each target's probability that the loss spreads evenly over the vocabulary.
    pub fn set_label_smoothing(&mut self, smoothing: f32) {
        self.label_smoothing = smoothing;
    }

    /// Sets the noise that training adds to embeddings: each element of a document of T tokens gets a uniform number
    /// of at most `alpha / sqrt(T * D)`, drawn anew in every step; 0 for none.
    ///
    /// # Source
    /// NEFTune, as Transformers has it, with the length of the document for that of the padded batch: the result
    /// of a document must not depend on what it is packed with.
    pub fn set_neftune_noise_alpha(&mut self, alpha: f32) {
        self.neftune_noise_alpha = alpha;
    }

    /// Sets what the first layers keep, one policy each; the others keep everything.
    pub fn set_keep(&mut self, keep: &[Keep]) {
        let all = std::iter::repeat(Keep::All);
        let keep = keep.iter().copied().chain(all);
        self.keep = keep.take(self.layers.len()).collect();
    }

    /// Whether training writes weights that are held as codes out while the product before theirs runs, for which it
    /// takes a second scratch matrix ([`ActivationPlan::write_ahead`]). Without effect where no weight is written out,
    /// on a CPU, and for `LLM.int8()`, which has a product of its own. Results do not depend on it.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn set_write_ahead(&mut self, wanted: bool) -> Result<()> {
        let groups = || self.layers.iter().flat_map(Layer::groups);
        let can = groups().any(LinearGroup::is_written_out)
            && !groups().any(LinearGroup::has_own_product);
        self.write_ahead = match &self.device {
            Device::Cuda(device) if wanted && can => Some(WriteAhead::new(device)?),
            _ => None,
        };
        Ok(())
    }

    /// Sets of how many of the first layers what they keep lies in pinned host memory from forward to backward
    /// ([`ActivationPlan::offloaded`]); without effect on a CPU. Results do not depend on it.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn set_offload(&mut self, layers: usize) -> Result<()> {
        let layers = layers.min(self.layers.len());
        self.offload = match &self.device {
            Device::Cuda(device) if layers > 0 => Some(Offload::new(device, layers)?),
            _ => None,
        };
        Ok(())
    }

    /// Bytes of pinned host memory that it holds for what layers keep.
    #[must_use]
    pub fn offloaded_bytes(&self) -> usize {
        self.offload.as_ref().map_or(0, Offload::host_bytes)
    }

    /// Adds the losses of the trained tokens of `batch` to `sums`, and their gradient to `grads`.
    ///
    /// `params`, `grads` and `sums` live on the device of the model. Nothing waits for a GPU.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary.
    pub fn loss_and_gradients(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        batch: &PackedBatch,
        sums: &mut Accumulator,
    ) -> Result<()> {
        let inputs = self.inputs(pass, batch);
        self.loss_and_gradients_by_layer(pass, params, grads, &inputs, sums, &mut |_, _| Ok(()))
    }

    /// Why a pass cannot be recorded once and replayed on other micro-batches of its shape, if it cannot.
    #[must_use]
    pub fn replay_obstacle(&self) -> Option<&'static str> {
        if self.config.ropes.iter().any(RopeConfig::depends_on_length) {
            return Some("the angles of RoPE depend on the lengths of documents");
        }
        let of_head = self.head.update.as_ref();
        let on_host = self.layers.iter().any(Layer::computes_on_host)
            || of_head.is_some_and(HeadUpdate::computes_on_host);
        on_host.then_some("the method computes a part of each pass on the host")
    }

    /// `batch` where the model is, for training and evaluation: on a GPU with padding.
    #[must_use]
    pub fn inputs<'a>(&self, pass: Pass<'_>, batch: &'a PackedBatch) -> Inputs<'a> {
        Inputs::new(self, pass, batch, self.device.is_cuda())
    }

    /// [`Model::loss_and_gradients`] that says when each layer's part of `grads` is complete. Moves
    /// nothing from or to a GPU.
    ///
    /// # Errors
    /// As there, and what `layer_done` returns.
    pub fn loss_and_gradients_by_layer(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        inputs: &Inputs<'_>,
        sums: &mut Accumulator,
        layer_done: &mut LayerDone<'_>,
    ) -> Result<()> {
        on_worker(|| self.forward_backward(pass, params, grads, inputs, sums, layer_done))
    }

    fn forward_backward(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        inputs: &Inputs<'_>,
        sums: &mut Accumulator,
        layer_done: &mut LayerDone<'_>,
    ) -> Result<()> {
        let mut run = Run::new(params, pass, inputs)?;
        if let Some(ahead) = &self.write_ahead {
            run.ahead = Some(Ahead::new(ahead, &self.layers, pass.workspace)?);
        }
        run.offload = self.offload.as_ref().map(Offloading::new);
        let mut layers = Vec::with_capacity(self.layers.len());
        let (x, Normed { y, statistics }) = self.decoder(&run, Some(&mut layers), None)?;
        let stream = Stream { x, statistics };
        let hidden = Normed::read(&y, &stream.x);
        let d_hidden = self.head_backward(&run, grads, hidden, sums)?;
        run.give(y);
        let saved = Saved { layers, stream };
        self.backward(&run, grads, saved, d_hidden, layer_done)?;
        run.end();
        Ok(())
    }

    /// Sum of the losses over the trained tokens of `batch`, nothing kept.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary.
    pub fn loss(&self, pass: Pass<'_>, params: &FlatBuffer, batch: &PackedBatch) -> Result<Sums> {
        let inputs = self.inputs(pass, batch);
        let run = Run::new(params, pass, &inputs)?;
        let (stream, Normed { y, statistics }) = self.decoder(&run, None, None)?;
        let mut sums = Accumulator::new(pass.workspace.device());
        self.head_loss(&run, Normed::read(&y, &stream), &mut sums)?;
        run.give(y.into_iter().chain(statistics).chain([stream]));
        run.end();
        Ok(sums.read()?)
    }

    /// The hidden states after the final norm, `[T, D]`.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary.
    pub fn hidden(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        batch: &PackedBatch,
    ) -> Result<Tensor> {
        let inputs = Inputs::new(self, pass, batch, false);
        let run = Run::new(params, pass, &inputs)?;
        let (stream, normed) = self.decoder(&run, None, None)?;
        let hidden = normed.into_read(&run, stream);
        run.end();
        self.without_prompt(pass, batch, hidden)
    }

    /// `hidden` without the rows of a prompt.
    fn without_prompt(
        &self,
        pass: Pass<'_>,
        batch: &PackedBatch,
        hidden: Tensor,
    ) -> Result<Tensor> {
        match self.prompt {
            Some(Prompt { tokens, .. }) => {
                prompt::without_prompt(hidden, batch, tokens, pass.workspace)
            }
            None => Ok(hidden),
        }
    }

    /// The residual stream after each layer, the last one after the final norm, `[T, D]` each:
    /// what Transformers returns as `hidden_states[1..]`.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary.
    pub fn hidden_states(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        batch: &PackedBatch,
    ) -> Result<Vec<Tensor>> {
        let inputs = Inputs::new(self, pass, batch, false);
        let run = Run::new(params, pass, &inputs)?;
        let mut states = Vec::new();
        let (stream, normed) = self.decoder(&run, None, Some(&mut states))?;
        states.pop();
        states.push(normed.into_read(&run, stream));
        let states = states.into_iter();
        states
            .map(|state| self.without_prompt(pass, batch, state))
            .collect()
    }

    /// Logits of every token, `[T, V]` f32: for comparison and sampling, never in training.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary.
    pub fn logits(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        batch: &PackedBatch,
    ) -> Result<Tensor> {
        let hidden = self.hidden(pass, params, batch)?;
        self.project(pass, params, hidden.view())
    }

    /// The residual stream after the last layer, and its norm.
    fn decoder(
        &self,
        run: &Run<'_>,
        mut keep: Option<&mut Vec<LayerSaved>>,
        mut states: Option<&mut Vec<Tensor>>,
    ) -> Result<(Tensor, Normed)> {
        let mut stream = self.embed(run)?;
        let first_norm = self.layers.first().map_or(&self.norm, |l| &l.input_norm);
        let mut normed = first_norm.forward(run, &stream)?;
        let reached = self.first_reached();
        for (i, layer) in self.layers.iter().enumerate() {
            let next_norm = self.layers.get(i + 1).map_or(&self.norm, |l| &l.input_norm);
            let policy = (keep.is_some() && i >= reached).then(|| self.keep[i]);
            let (next, next_normed, mut saved) =
                layer.forward(run, stream, normed, next_norm, policy)?;
            (stream, normed) = (next, next_normed);
            if let Some(offload) = &run.offload {
                offload.forward_done(run, i, saved.as_mut())?;
            }
            if let (Some(layers), Some(saved)) = (&mut keep, saved) {
                layers.push(saved);
            }
            if let Some(states) = &mut states {
                states.push(stream.clone());
            }
        }
        if let Some(offload) = &run.offload {
            offload.left(run)?;
        }
        Ok((stream, normed))
    }

    /// The stream before the first layer.
    fn embed(&self, run: &Run<'_>) -> Result<Tensor> {
        let mut stream = self.embedding.forward(run, &run.inputs.ids)?;
        let prompt = |scaled: bool| self.embedded_prompt.as_ref().filter(|p| p.scaled == scaled);
        if let Some(prompt) = prompt(true) {
            prompt.place(run, &mut stream)?;
        }
        if let Some(scale) = self.config.embedding_scale {
            axpby::scale(scale.in_dtype(run.dtype), stream.view_mut())?;
        }
        run.add_noise(&mut stream)?;
        if let Some(prompt) = prompt(false) {
            prompt.place(run, &mut stream)?;
        }
        if let Some(positions) = &self.positions {
            positions.add(run, &mut stream)?;
        }
        Ok(stream)
    }

    /// Columns that the gradient of the stream has room for beside its own.
    fn room(&self) -> usize {
        let rooms = self.layers.iter().map(|l| l.o.room().max(l.down.room()));
        rooms.max().unwrap_or(0)
    }

    /// Adds the gradients of what is trained of the embedding and of positions, given that of the stream.
    fn embed_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        mut d_stream: ViewMut<'_>,
    ) -> Result<()> {
        if let Some(positions) = &self.positions {
            positions.backward(run, grads, d_stream.as_view())?;
        }
        let prompt = |scaled: bool| self.embedded_prompt.as_ref().filter(|p| p.scaled == scaled);
        if let Some(prompt) = prompt(false) {
            prompt.backward(run, grads, d_stream.as_view())?;
        }
        if !self.embedding.trained() && prompt(true).is_none() {
            return Ok(());
        }
        if let Some(scale) = self.config.embedding_scale {
            axpby::scale(scale.in_dtype(run.dtype), d_stream.reborrow())?;
        }
        if let Some(prompt) = prompt(true) {
            prompt.backward(run, grads, d_stream.as_view())?;
        }
        let ids = &run.inputs.ids;
        self.embedding.backward(run, grads, ids, d_stream.as_view())
    }

    /// From the gradient of the final hidden states to those of all trained parameters.
    fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        saved: Saved,
        d_hidden: Tensor,
        layer_done: &mut LayerDone<'_>,
    ) -> Result<()> {
        let Saved { mut layers, stream } = saved;
        let width = self.config.hidden_size;
        let mut d_stream = run
            .workspace
            .take_zeroed(run.dtype, run.rows, width + self.room());
        stream.norm_backward(run, grads, &self.norm, &d_hidden, &mut d_stream)?;
        run.workspace.give(d_hidden);
        stream.release(run.workspace);
        let (input_trained, reached) = (self.input_trained(), self.first_reached());
        while let Some(mut saved) = layers.pop() {
            let index = reached + layers.len();
            if let Some(offload) = &run.offload {
                offload.arrived(run, index, &mut saved)?;
                if let Some(next) = layers.last_mut() {
                    offload.fetch(run, index - 1, next)?;
                }
            }
            let needs_input = input_trained || index > reached;
            self.layers[index].backward(run, grads, saved, &mut d_stream, needs_input)?;
            layer_done(grads, index)?;
        }
        self.embed_backward(run, grads, d_stream.view_mut().columns(0..width))?;
        run.workspace.give(d_stream);
        Ok(())
    }

    /// Whether anything before the layers is trained.
    fn input_trained(&self) -> bool {
        self.embedding.trained()
            || self.embedded_prompt.is_some()
            || self.positions.as_ref().is_some_and(Positions::trained)
    }

    /// The first layer that backward reaches: before it nothing is trained.
    fn first_reached(&self) -> usize {
        if self.input_trained() {
            return 0;
        }
        let trained = self.layers.iter().position(Layer::trained);
        trained.unwrap_or(self.layers.len())
    }
}

/// Runs `body` on a worker thread: from outside, each parallel loop would hand its work over to one
/// and sleep until it is done, two switches of thread per operation.
fn on_worker<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| body())
}
