use super::{KWARGS, TYPE};
use crate::Result;
use crate::kwargs::Kwargs;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// `reduce_lr_on_plateau`: the rate is multiplied by `factor` when a metric stops improving.
///
/// Feed it the metric of each evaluation; between two of them the rate is constant. The whole
/// state is serialisable, since this schedule is not a function of the step.
///
/// # Source
/// `torch.optim.lr_scheduler.ReduceLROnPlateau` (2.15) with its defaults: mode min, factor 0.1,
/// patience 10, threshold 1e-4 relative, cooldown 0, min_lr 0, eps 1e-8.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlateauSchedule {
    lr: f64,
    /// `None` before the first metric: nothing to improve on.
    best: Option<f64>,
    bad_metrics: u64,
    cooldown_left: u64,
    larger_is_better: bool,
    absolute_threshold: bool,
    factor: f64,
    patience: u64,
    threshold: f64,
    cooldown: u64,
    min_lr: f64,
    eps: f64,
}

impl PlateauSchedule {
    /// Starts at `base_lr` with torch's keyword arguments.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for an unknown kwarg, one of the wrong type, or a factor of 1 or
    /// more.
    pub fn new(kwargs: &BTreeMap<String, Value>, base_lr: f64) -> Result<Self> {
        let mut kwargs = Kwargs::new(KWARGS, [TYPE, "reduce_lr_on_plateau"], kwargs);
        let factor = kwargs.number("factor", 0.1)?;
        if factor >= 1.0 {
            return Err(kwargs.error("factor", &format!("{factor} is not below 1")));
        }
        let schedule = Self {
            lr: base_lr,
            best: None,
            bad_metrics: 0,
            cooldown_left: 0,
            larger_is_better: kwargs.choice("mode", &["min", "max"])? == Some("max"),
            absolute_threshold: kwargs.choice("threshold_mode", &["rel", "abs"])? == Some("abs"),
            factor,
            patience: kwargs.number("patience", 10.0)? as u64,
            threshold: kwargs.number("threshold", 1e-4)?,
            cooldown: kwargs.number("cooldown", 0.0)? as u64,
            min_lr: kwargs.number("min_lr", 0.0)?,
            eps: kwargs.number("eps", 1e-8)?,
        };
        kwargs.finish()?;
        Ok(schedule)
    }

    /// The rate in force.
    #[must_use]
    pub fn lr(&self) -> f64 {
        self.lr
    }

    /// Takes the next value of the metric and returns the rate from here on.
    ///
    /// A NaN never counts as an improvement.
    pub fn step(&mut self, metric: f64) -> f64 {
        if self.improves(metric) {
            self.best = Some(metric);
            self.bad_metrics = 0;
        } else {
            self.bad_metrics += 1;
        }
        if self.cooldown_left > 0 {
            self.cooldown_left -= 1;
            self.bad_metrics = 0;
        }
        if self.bad_metrics > self.patience {
            let reduced = (self.lr * self.factor).max(self.min_lr);
            if self.lr - reduced > self.eps {
                self.lr = reduced;
            }
            self.cooldown_left = self.cooldown;
            self.bad_metrics = 0;
        }
        self.lr
    }

    fn improves(&self, metric: f64) -> bool {
        let Some(best) = self.best else {
            return !metric.is_nan();
        };
        // A relative margin keeps best's sign, as torch's `metric < best * (1 - threshold)` does.
        let margin = if self.absolute_threshold {
            self.threshold
        } else {
            best * self.threshold
        };
        if self.larger_is_better {
            metric > best + margin
        } else {
            metric < best - margin
        }
    }
}
