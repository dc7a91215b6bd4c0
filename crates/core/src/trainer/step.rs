//! One optimizer step: gradients of every micro-batch, one reduction, clip, the optimizer.

use super::graphs::Graphs;
use super::optimizer::{self, Inputs, State, StateTensors};
use super::ranks::{self, Totals};
use super::together::Seat;
use crate::adapter::{Adapter, Attachment, Penalty, SiteId, StepDone};
use crate::data::{PackedBatch, padded_rows};
use crate::model::{
    DecoderConfig, Keep, LoadedBase, Mode, Model, ModelPlan, Pass, WeightFormat, WeightSource,
};
use crate::optimizer::OptimizerChoice;
use crate::params::{FlatBuffer, ParamLayoutBuilder};
use crate::process_group::{ProcessGroup, Solo};
use crate::run_log::StepReport;
use crate::{Error, Result};
use ferrotune_kernels::cuda::GemmTuning;
use ferrotune_kernels::linear_cross_entropy::{Accumulator, Sums};
use ferrotune_kernels::{DType, Device, Workspace};
use std::path::Path;
use std::sync::Arc;

/// What a step needs to know besides its data.
#[derive(Clone, Debug)]
pub struct TrainerOptions {
    /// Where to train.
    pub device: Device,
    /// Seed of initial values and dropout.
    pub seed: u64,
    /// How frozen weights are held.
    pub weights: WeightFormat,
    /// Dtype of activations.
    pub activation_dtype: DType,
    /// The optimizer.
    pub optimizer: OptimizerChoice,
    /// Weight decay of tensors that are decayed.
    pub weight_decay: f64,
    /// Label smoothing: the share of each target's probability that is spread evenly over the
    /// vocabulary, in training and evaluation.
    pub label_smoothing: f32,
    /// NEFTune: noise on embeddings in training ([`Model::set_neftune_noise_alpha`]); 0 for none.
    pub neftune_noise_alpha: f32,
    /// Global gradient norm above which gradients are scaled down; `None` never clips.
    pub max_grad_norm: Option<f64>,
    /// Tokens of the longest micro-batch; sizes the buffers.
    pub max_tokens: usize,
    /// Sums one gradient per micro-batch in the global order of micro-batches, so that the same rows give
    /// the same bits for any number of ranks. Moves and holds as many gradients as the step has
    /// micro-batches, over all ranks.
    pub deterministic_reduction: bool,
    /// What each layer keeps for its backward; layers without a policy keep everything. Memory and
    /// speed depend on it, results do not.
    pub keep: Vec<Keep>,
    /// On a GPU, writes weights that are held as codes out while the product before theirs runs
    /// ([`Model::set_write_ahead`]). Memory and speed depend on it, results do not.
    pub write_ahead: bool,
    /// On a GPU, of how many of the first layers what they keep lies in host memory from forward to backward
    /// ([`Model::set_offload`]). Memory and speed depend on it, results do not.
    pub offload: usize,
    /// On a GPU, records the micro-step of each shape as a graph and replays it, where that can be done.
    /// Speed depends on it, results do not. No other thread may use the device during a step then.
    pub cuda_graph: bool,
    /// How a GPU's algorithms are chosen. Results depend on it in their last bits.
    pub gemm_tuning: GemmTuning,
}

impl Default for TrainerOptions {
    /// Transformers' defaults: AdamW with betas 0.9 and 0.999, eps 1e-8, no decay, clip at 1.0, seed 42.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            seed: 42,
            weights: DType::F32.into(),
            activation_dtype: DType::F32,
            optimizer: OptimizerChoice::default(),
            weight_decay: 0.0,
            label_smoothing: 0.0,
            neftune_noise_alpha: 0.0,
            max_grad_norm: Some(1.0),
            max_tokens: 0,
            deterministic_reduction: false,
            keep: Vec::new(),
            write_ahead: false,
            offload: 0,
            cuda_graph: true,
            gemm_tuning: GemmTuning::Heuristic,
        }
    }
}

/// Loss and accuracy over a data set, token-weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvalReport {
    /// Mean loss over the label tokens, in nats.
    pub loss: f64,
    /// Mean entropy at label tokens, in nats.
    pub entropy: f64,
    /// Share of label tokens predicted right.
    pub mean_token_accuracy: f64,
    /// Label tokens.
    pub label_tokens: u64,
}

/// A model in training: frozen weights, trainable parameters, optimizer state and peers.
#[derive(Debug)]
pub struct Trainer {
    pub(super) model: Arc<Model>,
    /// Where it waits for others that train over the same base, if it does.
    pub(super) seat: Option<Seat>,
    adapter: Box<dyn Adapter>,
    pub(super) params: FlatBuffer,
    pub(super) grads: FlatBuffer,
    pub(super) optimizer: State,
    /// What the method remembers from step to step.
    method_state: Vec<FlatBuffer>,
    /// Loss and counts of this rank's micro-batches.
    pub(super) sums: Accumulator,
    pub(super) group: Box<dyn ProcessGroup>,
    pub(super) workspace: Workspace,
    pub(super) graphs: Graphs,
    pub(super) options: TrainerOptions,
    /// Per layer, how much of the front of `grads` is final once backward has passed it.
    pub(super) layer_ends: Vec<usize>,
    pub(super) step: u64,
}

impl Trainer {
    /// Shapes first, weights last: attaches `adapter` to the shape of `config`, reads the base from
    /// `source`, and gives the adapter its initial values.
    ///
    /// # Errors
    /// If the adapter does not fit (before any weight is read), or the weights do not.
    pub fn new(
        config: &DecoderConfig,
        source: &dyn WeightSource,
        adapter: Box<dyn Adapter>,
        mut group: Box<dyn ProcessGroup>,
        options: TrainerOptions,
    ) -> Result<Self> {
        if let Device::Cuda(device) = &options.device {
            device.set_gemm_tuning(options.gemm_tuning);
        }
        let (attachments, mut params) = attach(config, adapter.as_ref())?;
        params.move_to(&options.device);
        let mut model = Model::load(
            config,
            attachments,
            source,
            &mut params,
            options.weights.clone(),
        )?;
        model.set_keep(&options.keep);
        model.set_write_ahead(options.write_ahead)?;
        model.set_offload(options.offload)?;
        model.set_label_smoothing(options.label_smoothing);
        model.set_neftune_noise_alpha(options.neftune_noise_alpha);
        adapter.init(&mut params, options.seed)?;
        let mut base = LoadedBase {
            model: &mut model,
            source,
        };
        adapter.prepare(&mut params, &mut base)?;
        group.broadcast(&mut params)?;
        let rows = match options.device {
            Device::Cpu => options.max_tokens,
            Device::Cuda(_) => padded_rows(options.max_tokens),
        };
        let workspace = Workspace::on(options.device.clone(), rows);
        let mut trainer = Self::over(Arc::new(model), workspace, adapter, params, options)?;
        trainer.layer_ends = ModelPlan::new(config)
            .layers
            .iter()
            .map(|layer| trainer.params.layout().final_after(layer.first().0))
            .collect();
        trainer.graphs = graphs(&trainer.model, group.as_ref(), &trainer.options);
        trainer.group = group;
        Ok(trainer)
    }

    /// A trainer of its own, at step 0, over a model that is loaded.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub(super) fn over(
        model: Arc<Model>,
        workspace: Workspace,
        adapter: Box<dyn Adapter>,
        params: FlatBuffer,
        options: TrainerOptions,
    ) -> Result<Self> {
        let zeros = || FlatBuffer::zeros_on(params.layout(), &options.device);
        Ok(Self {
            method_state: adapter.state().iter().map(|_| zeros()).collect(),
            grads: zeros(),
            optimizer: State::new(&options, params.layout())?,
            sums: Accumulator::new(&options.device),
            graphs: Graphs::off(),
            group: Box::new(Solo),
            seat: None,
            layer_ends: Vec::new(),
            step: 0,
            model,
            adapter,
            params,
            workspace,
            options,
        })
    }

    /// One optimizer step over this rank's micro-batches at learning rate `lr`.
    ///
    /// The gradient is that of the mean loss over every trained token of the step, on all ranks:
    /// it does not depend on how rows are split into micro-batches or ranks. It is 0 if none is trained.
    ///
    /// # Errors
    /// [`Error::Numeric`] if the loss or the gradient norm is not finite; nothing is updated then.
    pub fn step(&mut self, micro_batches: &[PackedBatch], lr: f64) -> Result<StepReport> {
        let Updated {
            totals,
            trained_tokens,
            penalty,
            grad_norm,
        } = match self.updates_on_its_own() {
            true => self.recorded_update(micro_batches, lr)?,
            false => self.issued_update(micro_batches, lr)?,
        };
        let Sums { loss, entropy, .. } = totals.sums;
        self.check_finite("loss", loss / divisor(trained_tokens) as f64)?;
        self.check_finite("gradient norm", grad_norm)?;
        self.finish_step(grad_norm, divisor(trained_tokens))?;
        Ok(StepReport {
            loss_sum: loss + penalty * trained_tokens as f64,
            entropy_sum: entropy,
            trained_tokens,
            correct: totals.sums.correct,
            tokens: totals.tokens,
            sequences: totals.sequences,
            grad_norm,
            learning_rate: lr,
        })
    }

    /// Gradient and update with whoever has a say between the two.
    fn issued_update(&mut self, micro_batches: &[PackedBatch], lr: f64) -> Result<Updated> {
        let reduced = if self.options.deterministic_reduction {
            Some(self.gradients_in_order(micro_batches)?)
        } else {
            self.gradients(micro_batches)?
        };
        let (trained_tokens, tokens) = match reduced {
            Some(totals) => (totals.sums.count, totals.tokens),
            None => self.tokens_of(micro_batches),
        };
        check_labels(trained_tokens, tokens)?;
        let divisor = divisor(trained_tokens);
        if let Some(totals) = reduced {
            self.check_finite("loss", totals.sums.loss / divisor as f64)?;
        }
        let penalty = match self.adapter.completes_gradients() {
            true => {
                let weight = divisor as f32;
                self.adapter
                    .complete_gradients(&self.params, weight, &mut self.grads)?
            }
            false => Penalty::default(),
        };
        let (grad_norm, sums) = self.update(lr, divisor)?;
        let penalty = penalty.value()?;
        Ok(Updated {
            totals: reduced.unwrap_or_else(|| Totals::of(sums, micro_batches)),
            trained_tokens,
            penalty,
            grad_norm,
        })
    }

    /// The same where nobody has: what is issued is one graph, or one for each micro-batch and one for the update.
    fn recorded_update(&mut self, micro_batches: &[PackedBatch], lr: f64) -> Result<Updated> {
        let (trained_tokens, tokens) = self.tokens_of(micro_batches);
        check_labels(trained_tokens, tokens)?;
        let inputs = inputs(
            &self.options,
            &self.sums,
            self.step,
            lr,
            divisor(trained_tokens),
        );
        if let Some(mut update) = self.optimizer.on_gpu() {
            update.set(&inputs, &mut self.params)?;
        }
        if let [batch] = micro_batches {
            self.pass(batch, false, true)?;
        } else {
            self.gradients(micro_batches)?;
            self.issue_update()?;
        }
        let (grad_norm, sums) = match self.optimizer.on_gpu() {
            Some(update) => update.read()?,
            None => unreachable!("only a GPU updates on its own"),
        };
        Ok(Updated {
            totals: Totals::of(sums, micro_batches),
            trained_tokens,
            penalty: 0.0,
            grad_norm,
        })
    }

    /// Whether an update is made of the gradient alone, where that is: by one rank on a GPU.
    fn updates_on_its_own(&mut self) -> bool {
        self.graphs.are_on()
            && self.group.world_size() == 1
            && !self.adapter.completes_gradients()
            && !self.adapter.preconditions()
            && self.optimizer.on_gpu().is_some()
    }

    /// Trained tokens of this rank's micro-batches, and all.
    fn tokens_of(&self, micro_batches: &[PackedBatch]) -> (u64, u64) {
        let trained = |batch: &PackedBatch| self.model.trained_tokens(batch) as u64;
        let tokens = |batch: &PackedBatch| batch.tokens() as u64;
        let batches = micro_batches.iter();
        (
            batches.clone().map(trained).sum(),
            batches.map(tokens).sum(),
        )
    }

    /// Lets the method have its say after an update, and counts it.
    fn finish_step(&mut self, grad_norm: f64, count: u64) -> Result<()> {
        let clip = optimizer::clip_factor(self.options.max_grad_norm, grad_norm);
        let done = StepDone {
            step: self.step,
            grads: &self.grads,
            grad_scale: (clip / count as f64) as f32,
            state: &mut self.method_state,
        };
        self.adapter.after_step(&mut self.params, done)?;
        self.step += 1;
        Ok(())
    }

    /// Ends training: what has no effect is cleared ([`Adapter::finish`]).
    pub fn finish(&mut self) {
        self.adapter.finish(&mut self.params);
    }

    /// Loss and accuracy over `batches`, without dropout. Every rank is given all of them and takes its
    /// share.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary, or a peer is lost.
    pub fn evaluate(&mut self, batches: &[PackedBatch]) -> Result<EvalReport> {
        let mut totals = Totals::default();
        let (rank, ranks) = (self.group.rank(), self.group.world_size());
        for batch in batches.iter().skip(rank).step_by(ranks) {
            totals.sums += match &self.seat {
                None => self.model.loss(self.eval_pass(), &self.params, batch)?,
                Some(seat) => seat.loss(&self.params, batch)?,
            };
        }
        let sums = ranks::sum_totals(self.group.as_mut(), totals)?.sums;
        check_labels(sums.count, 0)?;
        let count = sums.count as f64;
        Ok(EvalReport {
            loss: sums.loss / count,
            entropy: sums.entropy / count,
            mean_token_accuracy: sums.correct as f64 / count,
            label_tokens: sums.count,
        })
    }

    /// A pass without random draws, in this trainer's precision and buffers.
    #[must_use]
    pub fn eval_pass(&self) -> Pass<'_> {
        Pass {
            workspace: &self.workspace,
            dtype: self.options.activation_dtype,
            mode: Mode::Eval,
        }
    }

    /// The base model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The method that is trained.
    #[must_use]
    pub fn adapter(&self) -> &dyn Adapter {
        self.adapter.as_ref()
    }

    /// Trainable values.
    #[must_use]
    pub fn params(&self) -> &FlatBuffer {
        &self.params
    }

    /// Trainable values, to be replaced.
    pub fn params_mut(&mut self) -> &mut FlatBuffer {
        &mut self.params
    }

    /// Reads the trainable values from what the method has saved.
    ///
    /// # Errors
    /// As [`Adapter::load`].
    pub fn load_adapter(&mut self, directory: &Path) -> Result<()> {
        self.adapter.load(&mut self.params, directory)
    }

    /// Gradient of the last step: the sum over its trained tokens, not yet divided by their number.
    #[must_use]
    pub fn grads(&self) -> &FlatBuffer {
        &self.grads
    }

    /// What the optimizer and the method keep from step to step: `STATE.NAME` for each trainable tensor.
    #[must_use]
    pub fn state(&self) -> StateTensors<'_> {
        let mut tensors = self.optimizer.tensors();
        for (name, buffer) in self.adapter.state().iter().zip(&self.method_state) {
            tensors.extend(optimizer::tensors_of(name, buffer));
        }
        tensors
    }

    /// Steps done.
    #[must_use]
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Goes on from a checkpoint: parameters and [`Trainer::state`], as of `step`.
    pub fn restore(&mut self, step: u64, params: &FlatBuffer, state: &StateTensors<'_>) {
        self.step = step;
        let values = self.params.as_mut_slice();
        values.copy_from_slice(params.as_slice());
        self.optimizer.restore(state);
        for (name, buffer) in self.adapter.state().iter().zip(&mut self.method_state) {
            optimizer::restore(name, buffer, state);
        }
    }

    /// Makes every rank's parameters, state and step those of rank 0, which may have restored them.
    ///
    /// # Errors
    /// [`Error::Transient`] if a peer is lost.
    pub fn follow_first_rank(&mut self) -> Result<()> {
        let group = self.group.as_mut();
        if group.world_size() == 1 {
            return Ok(());
        }
        let steps = group.all_gather(&self.step.to_le_bytes())?;
        self.step = bytemuck::pod_read_unaligned(&steps[0]);
        group.broadcast(&mut self.params)?;
        self.optimizer.follow_first(group)?;
        for buffer in &mut self.method_state {
            group.broadcast(buffer)?;
        }
        Ok(())
    }

    /// Fails if the GPU has: values that could not be read from it are NaN ([`FlatBuffer::as_slice`]), which nobody
    /// should keep.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn check_device(&self) -> Result<()> {
        match &self.options.device {
            Device::Cpu => Ok(()),
            Device::Cuda(device) => Ok(device.check()?),
        }
    }

    /// Compares the bits of the parameters with every peer's.
    ///
    /// # Errors
    /// [`Error::Transient`] if a peer is lost, or naming the ranks whose parameters differ.
    pub fn check_replicas(&mut self) -> Result<()> {
        ranks::check_replicas(self.group.as_mut(), &self.params, self.step)
    }

    /// The peers.
    pub fn group_mut(&mut self) -> &mut dyn ProcessGroup {
        self.group.as_mut()
    }

    fn check_finite(&self, what: &str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let message = format!(
            "{what} is {value} at step {}; parameters are as after step {}. Lower learning_rate, set max_grad_norm, \
             or look for bad rows in the data",
            self.step + 1,
            self.step
        );
        Err(Error::Numeric { message })
    }

    /// Clips and applies the gradient of `count` trained tokens, unless it or the loss is not finite;
    /// returns its norm, and this rank's sums.
    fn update(&mut self, lr: f64, count: u64) -> Result<(f64, Sums)> {
        let mut inputs = inputs(&self.options, &self.sums, self.step, lr, count);
        let mut clipped = None;
        if self.adapter.preconditions() {
            let norm = optimizer::clip(&inputs, &mut self.grads);
            if !norm.is_finite() {
                return Ok((norm, self.sums.read()?));
            }
            self.adapter.precondition(&self.params, &mut self.grads)?;
            (inputs.divisor, inputs.max_norm, clipped) = (1.0, None, Some(norm));
        }
        let (norm, sums) = self
            .optimizer
            .update(inputs, &mut self.params, &mut self.grads)?;
        // That of the loss, unless what was made of it is not finite.
        let clipped = clipped.filter(|_| norm.is_finite());
        Ok((clipped.unwrap_or(norm), sums))
    }
}

/// What came of the passes and the update of a step.
struct Updated {
    /// Over all ranks.
    totals: Totals,
    trained_tokens: u64,
    /// What the method adds to the mean loss.
    penalty: f64,
    grad_norm: f64,
}

/// What the gradient is divided by. Rows of one token have no other to predict it from: the mean over none is 0.
fn divisor(trained_tokens: u64) -> u64 {
    trained_tokens.max(1)
}

/// What the update after `step` steps is made of.
fn inputs<'a>(
    options: &TrainerOptions,
    sums: &'a Accumulator,
    step: u64,
    lr: f64,
    count: u64,
) -> Inputs<'a> {
    Inputs {
        divisor: count as f64,
        max_norm: options.max_grad_norm,
        lr,
        weight_decay: options.weight_decay,
        step: step + 1,
        sums,
    }
}

/// The recorder of micro-steps, or why there is none.
fn graphs(model: &Model, group: &dyn ProcessGroup, options: &TrainerOptions) -> Graphs {
    if !options.device.is_cuda() || !options.cuda_graph {
        return Graphs::off();
    }
    let in_order = "deterministic_reduction reads every gradient";
    let on_host = "the optimizer computes on the host";
    // Rank 0 speaks for all.
    Graphs::new(
        group.rank() == 0,
        (options.deterministic_reduction.then_some(in_order))
            .or_else(|| options.optimizer.needs_host().then_some(on_host))
            .or_else(|| model.replay_obstacle()),
    )
}

fn check_labels(trained: u64, tokens: u64) -> Result<()> {
    if trained > 0 || tokens > 0 {
        return Ok(());
    }
    let message = "no token of this batch has a label; there is nothing to learn from".into();
    Err(Error::Numeric { message })
}

/// Matches `adapter` against the shape of `config`: attachments, and a zeroed parameter buffer.
///
/// # Errors
/// [`Error::Config`] if a pattern of the adapter matches nothing.
pub fn attach(
    config: &DecoderConfig,
    adapter: &dyn Adapter,
) -> Result<(Vec<(SiteId, Attachment)>, FlatBuffer)> {
    let plan = ModelPlan::new(config);
    let mut builder = ParamLayoutBuilder::new();
    let attachments = adapter.attach(&plan.sites, &mut builder)?;
    Ok((attachments, FlatBuffer::zeros(&builder.build()?)))
}
