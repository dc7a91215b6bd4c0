use crate::Result;
use std::path::PathBuf;

/// What a run is, known before its first step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunStarted {
    /// Base model, as configured.
    pub model: String,
    /// What is trained, such as `LoRA r=16 alpha=32`.
    pub method: String,
    /// Trained parameters.
    pub trainable_parameters: u64,
    /// All parameters, trained and frozen.
    pub total_parameters: u64,
    /// Rows of the training set, after packing.
    pub examples: u64,
    /// Passes over the training set.
    pub num_train_epochs: f64,
    /// Optimizer steps of the whole run.
    pub max_steps: u64,
    /// Step the run continues from; 0 for a fresh one.
    pub first_step: u64,
    /// Rows per micro-batch and rank.
    pub train_batch_size: u64,
    /// Micro-batches per optimizer step and rank.
    pub gradient_accumulation_steps: u64,
    /// Ranks.
    pub world_size: u64,
    /// Steps between log rows.
    pub logging_steps: u64,
    /// Steps between evaluations.
    pub eval_steps: u64,
    /// Steps between checkpoints.
    pub save_steps: u64,
}

/// Metrics of the steps since the last row, token-weighted, by TRL's names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogRow {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done, with the fraction of the current one.
    pub epoch: f64,
    /// Mean cross-entropy per trained token, nats. NaN if it is NaN: never filtered.
    pub loss: f64,
    /// L2 norm of the last step's gradient, before clipping.
    pub grad_norm: f64,
    /// Learning rate the last step used.
    pub learning_rate: f64,
    /// Mean entropy of the predictions per trained token, nats.
    pub entropy: f64,
    /// Tokens read since the start of training, prompts included, over all ranks.
    pub num_tokens: u64,
    /// Share of trained tokens predicted best.
    pub mean_token_accuracy: f64,
    /// Tokens read per second since the last row, over all ranks.
    pub tokens_per_second: f64,
    /// Seconds since this process began to train.
    pub elapsed: f64,
}

/// An evaluation's result, token-weighted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluated {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done.
    pub epoch: f64,
    /// Mean cross-entropy per trained token, nats.
    pub loss: f64,
    /// Mean entropy of the predictions per trained token, nats.
    pub entropy: f64,
    /// Tokens read by training so far.
    pub num_tokens: u64,
    /// Share of trained tokens predicted best.
    pub mean_token_accuracy: f64,
    /// Seconds it took.
    pub runtime: f64,
    /// Rows evaluated.
    pub samples: u64,
    /// Batches evaluated.
    pub batches: u64,
}

/// A checkpoint, complete on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointSaved {
    /// Optimizer steps done.
    pub step: u64,
    /// Its directory.
    pub path: PathBuf,
}

/// The end of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunFinished {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done.
    pub epoch: f64,
    /// Seconds this process trained.
    pub train_runtime: f64,
    /// Rows this process trained on, repeats included, over all ranks.
    pub samples: u64,
    /// Optimizer steps of this process.
    pub steps: u64,
    /// Mean loss per trained token over this process's steps.
    pub train_loss: f64,
    /// Floating point operations of training so far.
    pub total_flos: f64,
}

/// Something that happened in a run.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The run begins.
    RunStarted(RunStarted),
    /// A row of metrics is due.
    StepLogged(LogRow),
    /// An evaluation is done.
    Evaluated(Evaluated),
    /// A checkpoint is on disk.
    CheckpointSaved(CheckpointSaved),
    /// The run is over.
    RunFinished(RunFinished),
}

/// Something that writes events down, or shows them.
pub trait Observer {
    /// Takes one event, in the order they happened.
    ///
    /// # Errors
    /// [`crate::Error::Write`] if it cannot be written.
    fn on(&mut self, event: &Event) -> Result<()>;
}

/// Hands `event` to each observer in turn.
///
/// # Errors
/// The first observer's error; the ones after it have not seen the event.
pub fn emit(observers: &mut [Box<dyn Observer + '_>], event: &Event) -> Result<()> {
    observers
        .iter_mut()
        .try_for_each(|observer| observer.on(event))
}
