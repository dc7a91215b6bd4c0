//! The wiring of a training run, read top to bottom: config -> model shape -> adapter -> data ->
//! plan -> weights -> steps -> files.

mod adapter;
mod base_weights;
mod classifier;
mod data;
mod fitting;
mod host_memory;
mod least_time;
mod matched;
mod memory;
mod observers;
mod output_dir;
mod outputs;
mod preflight;
mod resume;
mod run_plan;
mod start;
mod summary;
mod together;

use adapter::adapter_from;
pub use adapter::adapter_of;
pub use classifier::classes;
#[cfg(feature = "hub")]
pub(crate) use data::is_of_split;
pub use data::{EpochData, eval_batches, prepare_rows, row_files};
pub use least_time::LeastTime;
pub use memory::available_memory;
pub use outputs::CheckpointFiles;
pub use preflight::{Preflight, ShownRow, prepare_data};
use run_plan::run_plan;
pub use summary::Summary;
pub use together::{Ended, Together};

use crate::{device, hub, threads};
use base_weights::{activation_dtype, weight_format, weights};
use ferrotune_core::adapter::Adapter;
use ferrotune_core::checkpoint::{self, BaseRecord, Checkpoint};
use ferrotune_core::config::{CudaGraph, GemmTuning, Resume, TrainConfig};
use ferrotune_core::data::{Dataset, PackedBatch, Record, Tokenizer};
use ferrotune_core::io::{ModelFiles, OutputLock};
use ferrotune_core::lr_schedule::LrSchedule;
use ferrotune_core::model::{
    ActivationPlan, DecoderConfig, NewHead, RandomWeights, WeightFormat, WeightSource, Workload,
};
use ferrotune_core::process_group::{Place, ProcessGroup, Solo};
use ferrotune_core::run_log::{LogWindow, Observer, RunStarted, TrainerState};
use ferrotune_core::trainer::{Run, RunOutcome, RunPlan, Trainer, TrainerOptions};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::Device;
use ferrotune_kernels::cuda;
use ferrotune_lora::Start;
use observers::{Silent, Tee};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// A run that is fully checked, and has read no weight yet.
#[derive(Debug)]
pub struct Recipe {
    /// What was asked for.
    pub config: TrainConfig,
    /// The base model's directory.
    pub base: PathBuf,
    /// What the base is.
    pub decoder: DecoderConfig,
    /// Its weights, headers only; `None` starts from random weights.
    pub files: Option<ModelFiles>,
    /// Which weights these are, for whoever uses the adapter.
    pub base_weights: Option<BaseRecord>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Training rows.
    pub dataset: Dataset,
    /// Evaluation rows.
    pub eval_dataset: Option<Dataset>,
    /// Intervals and length.
    pub plan: RunPlan,
    /// Trainable scalars.
    pub trainable: usize,
    /// Tokens of the longest micro-batch of the run.
    pub max_tokens: usize,
    /// Its micro-batches, as far as memory depends on them.
    pub workload: Workload,
    /// What each layer keeps for its backward.
    pub activations: ActivationPlan,
    /// Bytes there were when that was decided.
    pub available_memory: u64,
    /// Where it trains.
    pub device: Device,
    /// This process among its peers.
    pub place: Place,
    /// How the frozen weights are held.
    pub weights: WeightFormat,
    /// Digests of base and data, by name.
    pub fingerprints: BTreeMap<String, String>,
}

impl Recipe {
    /// Checks everything that can be checked without reading weights: output directory, model
    /// config, weight names and shapes, adapter targets, data.
    ///
    /// # Errors
    /// The first thing that is wrong, by file, line or key.
    pub fn prepare(config: TrainConfig) -> Result<Self> {
        Self::prepare_at(Place::SOLO, config)
    }

    /// [`Recipe::prepare`] for one of several processes, which then train together
    /// ([`Recipe::train_with`]). Every process reads configuration, base and data itself; the output
    /// directory is rank 0's alone.
    ///
    /// # Errors
    /// As [`Recipe::prepare`].
    pub fn prepare_at(place: Place, config: TrainConfig) -> Result<Self> {
        Self::prepare_from(place, config, data::training)
    }

    /// [`Recipe::prepare`] on rows that come from anywhere instead of files.
    ///
    /// `name` stands for them where a file's name would: in messages (`data: NAME:17: ...` is the
    /// 17th row), in the model card and in the saved configuration.
    ///
    /// # Errors
    /// As [`Recipe::prepare`].
    pub fn prepare_with_rows(
        mut config: TrainConfig,
        name: &str,
        rows: impl IntoIterator<Item = Record>,
    ) -> Result<Self> {
        config.data.dataset_name = vec![name.to_owned()];
        config.data.train_file.clear();
        Self::prepare_from(Place::SOLO, config, |config, tokenizer, model| {
            data::training_rows(config, tokenizer, model, rows)
        })
    }

    fn prepare_from(
        place: Place,
        mut config: TrainConfig,
        training: impl FnOnce(&TrainConfig, &Tokenizer, &data::OfModel) -> Result<data::Prepared>,
    ) -> Result<Self> {
        config.validate()?;
        threads::start(threads::share_of(place, config.runtime.num_threads))?;
        let device = device::open_for(config.runtime.device, place.local_rank)?;
        let base = base_directory(&config)?;
        if place.is_first() {
            output_dir::check(&config, &base)?;
        }
        let decoder = classifier::decoder(&config, &base)?;
        let files = weights(&config, &base, &decoder)?;
        start::require_readable(&config, &base, &decoder, files.as_ref())?;
        let decoder = adapter::decoder(&config, &base, decoder)?;
        let base_weights = files.as_ref().map(BaseRecord::of).transpose()?;
        let base_digest = outputs::base_digest(&base, base_weights.as_ref())?;
        let identity = outputs::identity_without_data(&config, &base_digest, place.world_size);
        if place.is_first() {
            resume::check_early(&config, &identity)?;
        }
        let shape = memory::Base {
            device: &device,
            directory: &base,
            decoder: &decoder,
            files: files.as_ref(),
            host: memory::host_share(place),
        };
        let attached = memory::attach(&config, shape)?;
        config.notes.extend_from_slice(&attached.notes);
        config.notes.extend(where_updated(&config, &device)?);
        let tokenizer = data::tokenizer(&config, &base)?;
        let of_model = data::OfModel::of(&base, &decoder)?;
        let rows = data::all(&config, &tokenizer, &of_model, training)?;
        let prompt_tokens = attached.prompt_tokens();
        data::check_fit(&config, &tokenizer, &rows, prompt_tokens, &decoder, &base)?;
        let (dataset, eval_dataset) = rows;
        let epochs = EpochData::new(&config, &dataset, decoder.hidden_size, place);
        let plan = run_plan(
            &config,
            epochs.steps_per_epoch(),
            attached.trainable,
            &decoder,
        )?;
        let workload = data::workload(&config, &epochs, plan.total_steps, eval_dataset.as_ref())?;
        let workload = workload.behind_prompt(prompt_tokens);
        let weights = weight_format(&config, files.as_ref(), &device);
        let fingerprints = outputs::fingerprints(identity, &dataset)?;
        let mut recipe = Self {
            config,
            base,
            decoder,
            files,
            base_weights,
            tokenizer,
            dataset,
            eval_dataset,
            plan,
            trainable: attached.trainable,
            max_tokens: workload.tokens,
            workload,
            activations: ActivationPlan::default(),
            available_memory: memory::share_of(&device, place)?,
            device,
            place,
            weights,
            fingerprints,
        };
        recipe.adapter()?;
        let (activations, note) = memory::plan(&recipe, &attached, recipe.available_memory)?;
        recipe.activations = activations;
        recipe.config.notes.extend(note);
        Ok(recipe)
    }

    /// Reads the weights, trains, and writes the result.
    ///
    /// # Errors
    /// The first error of a step or a write; checkpoints saved before stay.
    pub fn train(
        &self,
        observers: &mut [Box<dyn Observer + '_>],
        stop: &AtomicBool,
    ) -> Result<RunOutcome> {
        self.train_with(Box::new(Solo), observers, stop)
    }

    /// [`Recipe::train`] together with the peers of `group`, each of which calls it. Rank 0 reads
    /// checkpoints, writes files and calls `observers`; the others follow it, and return when it is done.
    ///
    /// # Errors
    /// As [`Recipe::train`]; [`Error::Transient`] if a peer is lost.
    pub fn train_with(
        &self,
        group: Box<dyn ProcessGroup>,
        observers: &mut [Box<dyn Observer + '_>],
        stop: &AtomicBool,
    ) -> Result<RunOutcome> {
        let asked = (group.rank(), group.world_size());
        if asked != (self.place.rank, self.place.world_size) {
            let message = format!(
                "prepared for rank {} of {}, and joined a group as rank {} of {}",
                self.place.rank, self.place.world_size, asked.0, asked.1
            );
            return Err(Error::config("rank", message));
        }
        if self.place.is_first() {
            self.lead(observers, stop, |from| self.trainer_from(group, from))
        } else {
            self.follow(group, stop)
        }
    }

    /// Trains as rank 0: all files and all words are its own. `trainer` is made for the checkpoint to go on from.
    fn lead(
        &self,
        observers: &mut [Box<dyn Observer + '_>],
        stop: &AtomicBool,
        trainer: impl FnOnce(Option<&Path>) -> Result<Trainer>,
    ) -> Result<RunOutcome> {
        let output = Path::new(&self.config.output.output_dir);
        // Dropped last: a new directory that nothing was written to goes with it.
        let _lock = OutputLock::acquire(output)?;
        let from = resume::find(self, output)?;
        if let Some(checkpoint) = &from {
            resume::refuse_to_go_back(output, checkpoint.step(), self.plan.total_steps)?;
        }
        let mut trainer = trainer(from.as_ref().map(Checkpoint::path))?;
        let (mut state, window) = match &from {
            Some(checkpoint) => resume::restore(self, checkpoint, &mut trainer)?,
            None => (self.new_state(), LogWindow::new(0)),
        };
        trainer.follow_first_rank()?;
        trainer.rehearse(&self.workload.sizes)?;
        let schedule = self.schedule()?;
        if from.is_none() {
            self.start_over(output)?;
        }
        let goes_on = !(self.plan.can_end_early && state.has_lost_patience());
        if goes_on && trainer.steps_done() < self.plan.total_steps {
            outputs::withdraw_result(output)?;
        }
        // Only now: what fails before this leaves the log of an earlier run as it is.
        let mut log = outputs::trainer_log(output, from.as_ref())?;
        let mut observer = Tee {
            log: &mut log,
            others: observers,
        };
        let started = self.run_started(&trainer, window.num_tokens());
        let outcome = {
            let eval_batches = self.eval_batches()?;
            let mut data = self.epoch_data();
            let files = CheckpointFiles::new(self);
            let keep = self.config.output.save_total_limit;
            let keeps_best = self.config.output.load_best_model_at_end;
            let mut save = |trainer: &Trainer, state: &TrainerState, window: &LogWindow| {
                let path = files.write(output, trainer, state, window)?;
                if let Some(keep) = keep {
                    checkpoint::rotate(output, keep, state.best_step().filter(|_| keeps_best))?;
                }
                Ok(path)
            };
            let run = Run {
                plan: self.plan.clone(),
                schedule: &schedule,
                data: &mut data,
                eval_batches: &eval_batches,
                observer: &mut observer,
                state: &mut state,
                window,
                resumed_from: from.as_ref().map(|c| c.path().to_path_buf()),
                stop,
                save: &mut save,
            };
            run.run(&mut trainer, started)?
        };
        // A run that was finished before has its results; no step was done that would change them.
        if let RunOutcome::Finished(finished) = &outcome
            && !(finished.steps == 0 && outputs::has_result(output, finished.step))
        {
            outputs::withdraw_result(output)?;
            if self.config.output.load_best_model_at_end {
                resume::go_back_to_best(self, output, &state, &mut trainer)?;
            }
            trainer.finish();
            outputs::write_final(self, output, &trainer, &state, finished)?;
        }
        // Whoever returns knows that what the run leaves behind is whole.
        trainer.group_mut().barrier()?;
        Ok(outcome)
    }

    /// Trains along with rank 0, without a word or a file.
    fn follow(&self, group: Box<dyn ProcessGroup>, stop: &AtomicBool) -> Result<RunOutcome> {
        let output = Path::new(&self.config.output.output_dir);
        let mut trainer = self.trainer_with(group)?;
        trainer.follow_first_rank()?;
        trainer.rehearse(&self.workload.sizes)?;
        let schedule = self.schedule()?;
        let started = self.run_started(&trainer, 0);
        let eval_batches = self.eval_batches()?;
        let run = Run {
            plan: self.plan.clone(),
            schedule: &schedule,
            data: &mut self.epoch_data(),
            eval_batches: &eval_batches,
            observer: &mut Silent,
            state: &mut self.new_state(),
            window: LogWindow::new(0),
            resumed_from: None,
            stop,
            save: &mut |trainer, _, _| Ok(checkpoint::path_of(output, trainer.steps_done())),
        };
        let outcome = run.run(&mut trainer, started)?;
        trainer.group_mut().barrier()?;
        Ok(outcome)
    }

    fn new_state(&self) -> TrainerState {
        TrainerState::new().with_selection(self.config.output.selection())
    }

    fn eval_batches(&self) -> Result<Vec<PackedBatch>> {
        let dataset = self.eval_dataset.as_ref();
        let batches = dataset.map(|d| eval_batches(&self.config, d)).transpose();
        Ok(batches?.unwrap_or_default())
    }

    /// This rank's micro-batches.
    fn epoch_data(&self) -> EpochData<'_> {
        EpochData::new(
            &self.config,
            &self.dataset,
            self.decoder.hidden_size,
            self.place,
        )
    }

    /// Takes an earlier run's checkpoints away: rotation would count them as newer than this run's.
    ///
    /// Nothing is left to fail before the first step when this is called, under the output's lock.
    fn start_over(&self, output: &Path) -> Result<()> {
        let settings = &self.config.output;
        if settings.resume_from_checkpoint == Resume::Never && settings.overwrite_output_dir {
            for path in checkpoint::remove_all(output)? {
                tracing::info!("removed {} of an earlier run", path.display());
            }
        }
        Ok(())
    }

    /// The trainer of this run, weights read, adapter at its initial values.
    ///
    /// # Errors
    /// If the weights cannot be read.
    pub fn trainer(&self) -> Result<Trainer> {
        self.trainer_with(Box::new(Solo))
    }

    /// [`Recipe::trainer`] beside the peers of `group`.
    ///
    /// # Errors
    /// As [`Recipe::trainer`]; [`Error::Transient`] if a peer is lost.
    pub fn trainer_with(&self, group: Box<dyn ProcessGroup>) -> Result<Trainer> {
        self.trainer_from(group, None)
    }

    /// [`Recipe::trainer_with`], with the base as it is in a run that goes on from the checkpoint `from`,
    /// of which rank 0 alone knows.
    fn trainer_from(
        &self,
        mut group: Box<dyn ProcessGroup>,
        from: Option<&Path>,
    ) -> Result<Trainer> {
        let start = start::agree(self, group.as_mut(), from)?;
        let adapter = self.adapter_from(start)?;
        let options = self.options()?;
        self.with_source(|source| Trainer::new(&self.decoder, source, adapter, group, options))
    }

    /// `body` on the weights of the base: its files, random ones where there are none, or files with a new head.
    fn with_source<R>(&self, body: impl FnOnce(&dyn WeightSource) -> R) -> R {
        let random = RandomWeights {
            seed: self.config.runtime.seed,
        };
        match &self.files {
            None => body(&random),
            Some(files) if NewHead::is_needed(&self.decoder, files) => body(&NewHead {
                rest: files,
                head: random,
            }),
            Some(files) => body(files),
        }
    }

    fn options(&self) -> Result<TrainerOptions> {
        let (optimizer, runtime) = (&self.config.optimizer, &self.config.runtime);
        Ok(TrainerOptions {
            device: self.device.clone(),
            seed: runtime.seed,
            weights: self.weights.clone(),
            activation_dtype: activation_dtype(&self.config, self.weights.dtype, &self.device),
            optimizer: optimizer.choice()?,
            weight_decay: optimizer.weight_decay,
            label_smoothing: optimizer.label_smoothing_factor as f32,
            neftune_noise_alpha: optimizer.neftune_noise_alpha.unwrap_or(0.0) as f32,
            max_grad_norm: (optimizer.max_grad_norm > 0.0).then_some(optimizer.max_grad_norm),
            max_tokens: self.max_tokens,
            deterministic_reduction: runtime.deterministic_reduction,
            keep: self.activations.keep.clone(),
            write_ahead: self.activations.write_ahead,
            offload: self.activations.offloaded,
            cuda_graph: runtime.cuda_graph == CudaGraph::Auto,
            gemm_tuning: match runtime.gemm_tuning {
                GemmTuning::Heuristic => cuda::GemmTuning::Heuristic,
                GemmTuning::Measure => cuda::GemmTuning::Measure,
            },
        })
    }

    /// The learning rate of each step.
    ///
    /// # Errors
    /// [`Error::Config`] for a schedule or an argument that does not exist.
    pub fn schedule(&self) -> Result<LrSchedule> {
        let schedule = &self.config.schedule;
        let total = self.plan.total_steps;
        let warmup = schedule.warmup_steps_of(total);
        let lr = self.config.optimizer.learning_rate;
        LrSchedule::new(
            &schedule.lr_scheduler_type,
            &schedule.lr_scheduler_kwargs,
            lr,
            warmup,
            total,
        )
    }

    /// The adapter, for its files and its name.
    ///
    /// # Errors
    /// [`Error::Config`] if its settings contradict each other.
    pub fn adapter(&self) -> Result<Box<dyn Adapter>> {
        self.adapter_from(None)
    }

    fn adapter_from(&self, start: Option<Start>) -> Result<Box<dyn Adapter>> {
        let mut adapter = adapter_from(&self.config, &self.base, &self.decoder, start)?;
        adapter.plan_steps(self.plan.total_steps)?;
        Ok(adapter)
    }

    fn run_started(&self, trainer: &Trainer, first_num_tokens: u64) -> RunStarted {
        RunStarted {
            model: self.base.display().to_string(),
            method: trainer.adapter().describe(),
            trainable_parameters: trainer.params().layout().trainable() as u64,
            total_parameters: self.total_parameters() as u64,
            examples: self.dataset.examples.len() as u64,
            num_train_epochs: self.plan.epochs(),
            max_steps: self.plan.total_steps,
            first_step: trainer.steps_done(),
            first_num_tokens,
            train_batch_size: self.config.data.per_device_train_batch_size as u64,
            gradient_accumulation_steps: self.config.optimizer.gradient_accumulation_steps as u64,
            world_size: self.place.world_size as u64,
            logging_steps: self.plan.log_every.unwrap_or(0),
            eval_steps: self.plan.eval_every.unwrap_or(0),
            save_steps: self.plan.save_every.unwrap_or(0),
        }
    }

    /// Scalars of base and adapter.
    #[must_use]
    pub fn total_parameters(&self) -> usize {
        let adapter = if self.config.lora.use_peft {
            self.trainable
        } else {
            0
        };
        self.decoder.parameters() + adapter
    }
}

/// A note where the optimizer does not compute on the device of the run.
fn where_updated(config: &TrainConfig, device: &Device) -> Result<Option<String>> {
    let on_host = device.is_cuda() && config.optimizer.choice()?.needs_host();
    Ok(on_host.then(|| {
        format!(
            "optim: {} keeps its state in host memory and updates there: gradients and values are copied in every step; \
             adamw_torch_fused computes on the GPU",
            config.optimizer.optim.as_str()
        )
    }))
}

fn base_directory(config: &TrainConfig) -> Result<PathBuf> {
    let Some(name) = &config.model.model_name_or_path else {
        return Err(Error::config(
            "model_name_or_path",
            "is missing; expected the directory of a Hugging Face model",
        ));
    };
    let revision = config.model.model_revision.as_deref();
    hub::model(name, revision, "model_name_or_path")
}
