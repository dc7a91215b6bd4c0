//! How many singular values are left at each step.

use crate::method::Keys;
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value, json};

/// Three phases: all ranks for `tinit` steps, then fewer by a cubic curve, then `target_r` per module on
/// average for the last `tfinal` steps.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    init_r: usize,
    pub(super) target_r: usize,
    tinit: u64,
    tfinal: u64,
    interval: u64,
    /// `None` until the length of the run is known.
    total: Option<u64>,
}

/// What happens after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Left {
    /// Importance is measured; with `Some(n)` all but n singular values are set to zero, for now.
    Measured(Option<usize>),
    /// All but this many singular values are set to zero, for good.
    Decided(usize),
    /// What was set to zero is set to zero again.
    Kept,
}

impl Budget {
    pub(super) fn read(keys: &mut Keys<'_>, init_r: usize) -> Result<Self> {
        let target_r = keys.integer("target_r", 8)?;
        // PEFT saves such a file where its default of 8 was left as it was and nothing was cut.
        if target_r > init_r && keys.are_asked() {
            return Err(keys.error(
                "target_r",
                format!("is {target_r}, more than init_r, {init_r}: ranks are only cut"),
            ));
        }
        let given = keys.get("total_step").is_some();
        let total = keys.positive("total_step", 1)? as u64;
        let budget = Self {
            init_r,
            target_r: target_r.min(init_r),
            tinit: keys.integer("tinit", 0)? as u64,
            tfinal: keys.integer("tfinal", 0)? as u64,
            interval: keys.positive("deltaT", 1)? as u64,
            total: given.then_some(total),
        };
        match budget.fault() {
            None => Ok(budget),
            Some(message) => Err(keys.error("total_step", message)),
        }
    }

    pub(super) fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("target_r".into(), json!(self.target_r));
        keys.insert("tinit".into(), json!(self.tinit));
        keys.insert("tfinal".into(), json!(self.tfinal));
        keys.insert("deltaT".into(), json!(self.interval));
        keys.insert("total_step".into(), json!(self.total));
    }

    /// The run has this many steps.
    pub(super) fn plan_steps(&mut self, steps: u64) -> Result<()> {
        let wrong = |message| Err(Error::config("peft_config.total_step", message));
        match self.total {
            Some(total) if total > steps => {
                return wrong(format!(
                    "is {total}, and the run has {steps} steps, so that ranks would not come down to \
                     target_r; leave it out: it is the length of the run then"
                ));
            }
            Some(_) => {}
            None => self.total = Some(steps),
        }
        match self.fault() {
            None => Ok(()),
            Some(message) => wrong(message),
        }
    }

    /// Why there is no step at which ranks could be cut.
    fn fault(&self) -> Option<String> {
        let (total, tinit, tfinal) = (self.total?, self.tinit, self.tfinal);
        (tinit.saturating_add(tfinal) >= total).then(|| {
            format!(
                "is {total}, and tinit {tinit} and tfinal {tfinal} leave no step to cut ranks at; \
                 make them less than {total} together"
            )
        })
    }

    /// What happens after step `step`, counted from 0, over `modules` modules; `None` while the run's
    /// length is not known.
    pub(super) fn at(&self, step: u64, modules: usize) -> Option<Left> {
        let (all, target) = (self.init_r * modules, self.target_r * modules);
        let last = self.total?.saturating_sub(self.tfinal);
        Some(if step > last {
            Left::Kept
        } else if step == last {
            Left::Decided(target)
        } else if step <= self.tinit || !step.is_multiple_of(self.interval) {
            Left::Measured(None)
        } else {
            let rest = 1.0 - (step - self.tinit) as f64 / (last - self.tinit) as f64;
            let left = (all - target) as f64 * rest.powi(3) + target as f64;
            Left::Measured(Some(left as usize))
        })
    }
}
