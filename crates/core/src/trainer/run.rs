//! A training run: steps in order, logging, evaluation, checkpoints, and stopping in between.

use super::step::Trainer;
use crate::data::PackedBatch;
use crate::lr_schedule::LrSchedule;
use crate::run_log::{
    CheckpointSaved, Evaluated, Event, LogWindow, Observer, RunFinished, RunStarted, StepReport,
    TrainerState,
};
use crate::{Error, Result};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Where micro-batches come from. A pure function of the step, so that a resumed run reads what
/// the uninterrupted one would have read.
pub trait StepData {
    /// This rank's micro-batches of optimizer step `step`, from 0.
    ///
    /// # Errors
    /// Whatever reading them can fail with; the run ends with it.
    fn step(&mut self, step: u64) -> Result<Vec<PackedBatch>>;
}

impl<F: FnMut(u64) -> Result<Vec<PackedBatch>>> StepData for F {
    fn step(&mut self, step: u64) -> Result<Vec<PackedBatch>> {
        self(step)
    }
}

/// How long a run is and what happens when. Intervals are in optimizer steps.
#[derive(Clone, Debug, Default)]
pub struct RunPlan {
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps of one epoch.
    pub steps_per_epoch: u64,
    /// Steps between log rows.
    pub log_every: Option<u64>,
    /// Whether the first step is logged too.
    pub log_first: bool,
    /// Steps between checkpoints; one more is saved at the end.
    pub save_every: Option<u64>,
    /// Steps between evaluations.
    pub eval_every: Option<u64>,
    /// Whether a step whose evaluation is the best so far gets a checkpoint, whatever the interval.
    pub save_best: bool,
    /// Whether [`TrainerState::has_lost_patience`] ends the run.
    pub can_end_early: bool,
    /// Steps between comparisons of the parameters over ranks.
    pub check_replicas_every: Option<u64>,
    /// FLOPs of one step's token, for `total_flos`.
    pub flops_per_token: f64,
}

impl RunPlan {
    /// Passes over the training set, the last one of which may be a part.
    #[must_use]
    pub fn epochs(&self) -> f64 {
        self.total_steps as f64 / self.steps_per_epoch.max(1) as f64
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum RunOutcome {
    /// All steps were done.
    Finished(RunFinished),
    /// The stop flag was set: the checkpoint that was saved, unless no step had been done.
    Stopped {
        /// Steps done.
        step: u64,
        /// Where to resume from.
        checkpoint: Option<PathBuf>,
    },
}

/// Saves a checkpoint and says where.
pub type Save<'a> = dyn FnMut(&Trainer, &TrainerState, &LogWindow) -> Result<PathBuf> + 'a;

/// Everything a run needs besides the trainer.
pub struct Run<'a> {
    /// How long, and what when.
    pub plan: RunPlan,
    /// Learning rate of each step.
    pub schedule: &'a LrSchedule,
    /// Micro-batches of each step.
    pub data: &'a mut dyn StepData,
    /// Batches to evaluate on, of all ranks.
    pub eval_batches: &'a [PackedBatch],
    /// Who hears of it.
    pub observer: &'a mut dyn Observer,
    /// History so far; goes into checkpoints.
    pub state: &'a mut TrainerState,
    /// Metrics since the last log row.
    pub window: LogWindow,
    /// The checkpoint the run goes on from, if it does: it is not written again.
    pub resumed_from: Option<PathBuf>,
    /// Set from a signal handler: finish the step, save, leave.
    pub stop: &'a AtomicBool,
    /// Saves a checkpoint.
    pub save: &'a mut Save<'a>,
}

/// Sums over the steps since this process began.
#[derive(Default)]
struct Totals {
    steps: u64,
    samples: u64,
}

impl Run<'_> {
    /// Trains until the last step or until the stop flag is set.
    ///
    /// # Errors
    /// The first error of a step, an observer or a save. Checkpoints saved before stay.
    pub fn run(mut self, trainer: &mut Trainer, started: RunStarted) -> Result<RunOutcome> {
        let begin = Instant::now();
        self.emit(&Event::RunStarted(started))?;
        let mut totals = Totals::default();
        let mut saved = self.resumed_from.take().map(|p| (trainer.steps_done(), p));
        let spent = self.loses_patience(trainer)?;
        while !spent && trainer.steps_done() < self.plan.total_steps {
            let step = trainer.steps_done();
            let stop = self.stop.load(Ordering::SeqCst);
            if trainer.group_mut().begin_step(step, stop)? {
                return self.stopped(trainer, saved);
            }
            let batches = self.data.step(step)?;
            let report = trainer.step(&batches, self.schedule.lr(step))?;
            totals.add(&report);
            let early = self.after_step(trainer, &report, &begin)?;
            let done = trainer.steps_done();
            let last = early || done == self.plan.total_steps;
            let due = |every: Option<u64>| every.is_some_and(|n| done.is_multiple_of(n) || last);
            if due(self.plan.check_replicas_every) {
                trainer.check_replicas()?;
            }
            let best = self.plan.save_best && self.state.best_step() == Some(done);
            if due(self.plan.save_every) || best {
                saved = Some((done, self.checkpoint(trainer)?));
            }
            if early {
                break;
            }
        }
        let finished = self.finished(trainer, &totals, begin.elapsed().as_secs_f64());
        self.emit(&Event::RunFinished(finished.clone()))?;
        Ok(RunOutcome::Finished(finished))
    }

    /// Logs and evaluates what is due; whether the run is to end early.
    fn after_step(
        &mut self,
        trainer: &mut Trainer,
        report: &StepReport,
        begin: &Instant,
    ) -> Result<bool> {
        let done = trainer.steps_done();
        let epoch = self.epoch(done);
        self.window.add(report);
        self.state.advance(done, epoch, self.window.num_tokens());
        let last = done == self.plan.total_steps;
        let due = self
            .plan
            .log_every
            .is_some_and(|n| done.is_multiple_of(n) || last);
        if due || (self.plan.log_first && done == 1) {
            let row = self.window.take(done, epoch, begin.elapsed().as_secs_f64());
            self.emit(&Event::StepLogged(row))?;
        }
        if self
            .plan
            .eval_every
            .is_some_and(|n| done.is_multiple_of(n) || last)
        {
            self.evaluate(trainer)?;
            return self.loses_patience(trainer);
        }
        Ok(false)
    }

    /// Whether evaluations have not become better for as long as the run may wait, as rank 0 has it: it alone
    /// knows those before a resume.
    fn loses_patience(&mut self, trainer: &mut Trainer) -> Result<bool> {
        if !self.plan.can_end_early {
            return Ok(false);
        }
        let lost = trainer
            .group_mut()
            .all_gather(&[u8::from(self.state.has_lost_patience())])?;
        Ok(lost.first().is_some_and(|word| word == &[1]))
    }

    fn evaluate(&mut self, trainer: &mut Trainer) -> Result<()> {
        let begin = Instant::now();
        let report = trainer.evaluate(self.eval_batches)?;
        let step = trainer.steps_done();
        self.emit(&Event::Evaluated(Evaluated {
            step,
            epoch: self.epoch(step),
            loss: report.loss,
            entropy: report.entropy,
            num_tokens: self.window.num_tokens(),
            mean_token_accuracy: report.mean_token_accuracy,
            runtime: begin.elapsed().as_secs_f64(),
            samples: self
                .eval_batches
                .iter()
                .map(PackedBatch::sequences)
                .sum::<usize>() as u64,
            batches: self.eval_batches.len() as u64,
        }))
    }

    fn checkpoint(&mut self, trainer: &Trainer) -> Result<PathBuf> {
        let path = (self.save)(trainer, self.state, &self.window)?;
        let saved = CheckpointSaved {
            step: trainer.steps_done(),
            path: path.clone(),
        };
        self.emit(&Event::CheckpointSaved(saved))?;
        Ok(path)
    }

    fn stopped(&mut self, trainer: &Trainer, saved: Option<(u64, PathBuf)>) -> Result<RunOutcome> {
        let step = trainer.steps_done();
        let checkpoint = match saved {
            Some((at, path)) if at == step => Some(path),
            _ if step == 0 => None,
            _ => Some(self.checkpoint(trainer)?),
        };
        Ok(RunOutcome::Stopped { step, checkpoint })
    }

    fn finished(&self, trainer: &Trainer, totals: &Totals, seconds: f64) -> RunFinished {
        let step = trainer.steps_done();
        RunFinished {
            step,
            epoch: self.epoch(step),
            train_runtime: seconds,
            samples: totals.samples,
            steps: totals.steps,
            train_loss: self.window.run_loss(),
            total_flos: self.plan.flops_per_token * self.window.num_tokens() as f64,
        }
    }

    fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.plan.steps_per_epoch.max(1) as f64
    }

    fn emit(&mut self, event: &Event) -> Result<(), Error> {
        self.state.on(event)?;
        self.observer.on(event)
    }
}

impl Totals {
    fn add(&mut self, report: &StepReport) {
        self.steps += 1;
        self.samples += report.sequences;
    }
}
