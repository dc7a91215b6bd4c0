use super::source::{OURS, TRANSFORMERS};
use crate::config::section::section;
use serde_json::Value;
use std::collections::BTreeMap;

section! {
    /// How long, and at which learning rate when.
    ScheduleArguments, "schedule" {
        /// Passes over the training data; may be a fraction.
        num_train_epochs: f64 = 3.0, TRANSFORMERS;
        /// Optimizer steps; -1 leaves it to num_train_epochs, any other number overrides that.
        max_steps: i64 = -1, TRANSFORMERS;
        /// Learning rate schedule: linear, cosine, cosine_with_restarts, polynomial, constant,
        /// constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau, cosine_with_min_lr,
        /// cosine_warmup_with_min_lr or warmup_stable_decay.
        lr_scheduler_type: String = "linear".to_owned(), TRANSFORMERS;
        /// The schedule's own arguments, such as {num_cycles: 2}.
        lr_scheduler_kwargs: BTreeMap<String, Value> = BTreeMap::new(), TRANSFORMERS;
        /// Warmup: steps if 1 or more, a share of all steps below 1 (rounded up).
        warmup_steps: f64 = 0.0, TRANSFORMERS;
        /// Warmup as a share of all steps (rounded up), if warmup_steps is 0.
        warmup_ratio: f64 = 0.0, OURS;
    }
}

impl ScheduleArguments {
    /// Warmup steps in a run of `total_steps`.
    ///
    /// # Source
    /// `TrainingArguments.get_warmup_steps` (Transformers 5.23), and `warmup_ratio` of 4.x, which
    /// is overridden by `warmup_steps`.
    #[must_use]
    pub fn warmup_steps_of(&self, total_steps: u64) -> u64 {
        if self.warmup_steps > 0.0 {
            steps_or_ratio(self.warmup_steps, total_steps)
        } else {
            (self.warmup_ratio * total_steps as f64).ceil() as u64
        }
    }

    /// Optimizer steps of the run, for so many steps per epoch.
    ///
    /// # Source
    /// `Trainer.set_initial_training_values` (Transformers 5.23): `ceil(epochs * steps_per_epoch)`,
    /// unless `max_steps` says otherwise.
    #[must_use]
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        match u64::try_from(self.max_steps) {
            Ok(steps) if steps > 0 => steps,
            _ => (self.num_train_epochs * steps_per_epoch as f64).ceil() as u64,
        }
    }
}

/// `value` as steps if it is 1 or more, else that share of `total_steps`, rounded up.
#[must_use]
pub(in crate::config) fn steps_or_ratio(value: f64, total_steps: u64) -> u64 {
    if value >= 1.0 {
        value as u64
    } else {
        (value * total_steps as f64).ceil() as u64
    }
}
