//! Learning rate schedules, by the names and formulas of Transformers.
//!
//! A schedule is a pure function of the optimizer step, so nothing of it needs saving. The one
//! exception, `reduce_lr_on_plateau`, follows a metric: [`PlateauSchedule`].

mod plateau;
#[cfg(test)]
mod tests;

pub use plateau::PlateauSchedule;

use crate::kwargs::Kwargs;
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::f64::consts::PI;

/// The keys of the configuration that choose a schedule and hold its arguments.
const TYPE: &str = "lr_scheduler_type";
const KWARGS: &str = "lr_scheduler_kwargs";

/// The names `lr_scheduler_type` can hold.
pub const SCHEDULE_NAMES: [&str; 11] = [
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
];

/// How a phase of `warmup_stable_decay` moves between its two ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Curve {
    Linear,
    Cosine,
    OneMinusSqrt,
}

/// The shape after warmup; every number is a kwarg of the same name.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Linear,
    Cosine {
        num_cycles: f64,
        min_lr_rate: f64,
    },
    CosineWithRestarts {
        num_cycles: f64,
    },
    Polynomial {
        lr_end: f64,
        power: f64,
    },
    Constant,
    ConstantWithWarmup,
    InverseSqrt {
        timescale: f64,
    },
    CosineWarmupWithMinLr {
        num_cycles: f64,
        min_lr_rate: f64,
        warmup_lr_rate: Option<f64>,
    },
    WarmupStableDecay {
        stable_steps: f64,
        decay_steps: f64,
        warmup_type: Curve,
        decay_type: Curve,
        min_lr_ratio: f64,
        num_cycles: f64,
    },
}

/// A learning rate for every optimizer step.
///
/// # Source
/// `transformers.get_scheduler` (5.23), where the rate of step k is the one the optimizer uses for
/// its k-th update, counted from 0.
#[derive(Clone, Debug, PartialEq)]
pub struct LrSchedule {
    shape: Shape,
    base_lr: f64,
    warmup: f64,
    total: f64,
}

impl LrSchedule {
    /// The schedule called `name` with Transformers' `lr_scheduler_kwargs`.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown name or kwarg (with the nearest known one), a kwarg of the
    /// wrong type or out of range, and for `reduce_lr_on_plateau`, which is a [`PlateauSchedule`].
    pub fn new(
        name: &str,
        kwargs: &BTreeMap<String, Value>,
        base_lr: f64,
        warmup_steps: u64,
        total_steps: u64,
    ) -> Result<Self> {
        let warmup = warmup_steps as f64;
        let total = total_steps as f64;
        let mut kwargs = Kwargs::new(KWARGS, [TYPE, name], kwargs);
        let shape = shape(name, &mut kwargs, base_lr, warmup, total)?;
        kwargs.finish()?;
        Ok(Self {
            shape,
            base_lr,
            warmup,
            total,
        })
    }

    /// Learning rate of the optimizer step `step`, counted from 0. Defined past the end too.
    #[must_use]
    pub fn lr(&self, step: u64) -> f64 {
        self.base_lr * self.factor(step as f64)
    }

    /// The factor on the base rate, for whole steps held as f64 (exact to 2^53).
    fn factor(&self, step: f64) -> f64 {
        let (warmup, total) = (self.warmup, self.total);
        if step < warmup
            && let Some(factor) = self.warmup_factor(step)
        {
            return factor;
        }
        let progress = (step - warmup) / (total - warmup).max(1.0);
        match self.shape {
            Shape::Constant | Shape::ConstantWithWarmup => 1.0,
            Shape::Linear => ((total - step) / (total - warmup).max(1.0)).max(0.0),
            Shape::Cosine {
                num_cycles,
                min_lr_rate,
            } => raised(half_wave(num_cycles, progress), min_lr_rate),
            Shape::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            Shape::CosineWithRestarts { num_cycles } => {
                (0.5 * (1.0 + (PI * ((num_cycles * progress) % 1.0)).cos())).max(0.0)
            }
            Shape::Polynomial { lr_end, power } => self.polynomial(step, lr_end, power),
            Shape::InverseSqrt { timescale } => {
                1.0 / ((step + timescale - warmup) / timescale).sqrt()
            }
            Shape::CosineWarmupWithMinLr {
                num_cycles,
                min_lr_rate,
                ..
            } => {
                let progress = (step - warmup + 1.0) / (total - warmup).max(1.0);
                raised(half_wave(num_cycles, progress), min_lr_rate)
            }
            Shape::WarmupStableDecay { .. } => self.decay(step),
        }
    }

    /// The factor before `warmup`; `None` for a schedule that has no warmup.
    fn warmup_factor(&self, step: f64) -> Option<f64> {
        let linear = step / self.warmup.max(1.0);
        Some(match self.shape {
            Shape::Constant => return None,
            Shape::CosineWarmupWithMinLr {
                warmup_lr_rate: Some(rate),
                ..
            } => rate + (1.0 - rate) * step / (self.warmup - 1.0).max(1.0),
            Shape::CosineWarmupWithMinLr { .. } => (step + 1.0) / self.warmup.max(1.0),
            Shape::WarmupStableDecay {
                warmup_type,
                min_lr_ratio,
                ..
            } => {
                let factor = match warmup_type {
                    Curve::Linear => linear,
                    Curve::Cosine => 0.5 * (1.0 - (PI * linear).cos()),
                    Curve::OneMinusSqrt => 1.0 - (1.0 - linear).sqrt(),
                };
                raised(factor, min_lr_ratio)
            }
            _ => linear,
        })
    }

    fn polynomial(&self, step: f64, lr_end: f64, power: f64) -> f64 {
        // With warmup to the very end there is no decay to spread, and step == total is its end.
        if step > self.total || self.total <= self.warmup {
            return lr_end / self.base_lr;
        }
        let remaining = 1.0 - (step - self.warmup) / (self.total - self.warmup);
        ((self.base_lr - lr_end) * remaining.powf(power) + lr_end) / self.base_lr
    }

    fn decay(&self, step: f64) -> f64 {
        let Shape::WarmupStableDecay {
            stable_steps,
            decay_steps,
            decay_type,
            min_lr_ratio,
            num_cycles,
            ..
        } = self.shape
        else {
            return 1.0;
        };
        let decay_start = self.warmup + stable_steps;
        if step < decay_start {
            return 1.0;
        }
        if step >= decay_start + decay_steps {
            return min_lr_ratio;
        }
        let progress = (step - decay_start) / decay_steps.max(1.0);
        let factor = match decay_type {
            Curve::Linear => 1.0 - progress,
            Curve::Cosine => half_wave(num_cycles, progress),
            Curve::OneMinusSqrt => 1.0 - progress.sqrt(),
        };
        raised(factor, min_lr_ratio)
    }
}

/// Cosine from 1 down to 0 at `num_cycles` = 0.5 and `progress` = 1.
fn half_wave(num_cycles: f64, progress: f64) -> f64 {
    0.5 * (1.0 + (PI * num_cycles * 2.0 * progress).cos())
}

/// `factor` in 0..1 moved to `floor`..1, never negative.
fn raised(factor: f64, floor: f64) -> f64 {
    (factor * (1.0 - floor) + floor).max(0.0)
}

fn shape(
    name: &str,
    kwargs: &mut Kwargs<'_>,
    base_lr: f64,
    warmup: f64,
    total: f64,
) -> Result<Shape> {
    Ok(match name {
        "linear" => Shape::Linear,
        "constant" => Shape::Constant,
        "constant_with_warmup" => Shape::ConstantWithWarmup,
        "cosine" => Shape::Cosine {
            num_cycles: kwargs.number("num_cycles", 0.5)?,
            min_lr_rate: 0.0,
        },
        "cosine_with_restarts" => Shape::CosineWithRestarts {
            num_cycles: kwargs.number("num_cycles", 1.0)?,
        },
        "cosine_with_min_lr" => Shape::Cosine {
            num_cycles: kwargs.number("num_cycles", 0.5)?,
            min_lr_rate: min_lr_rate(kwargs, base_lr)?,
        },
        "cosine_warmup_with_min_lr" => Shape::CosineWarmupWithMinLr {
            num_cycles: kwargs.number("num_cycles", 0.5)?,
            min_lr_rate: min_lr_rate(kwargs, base_lr)?,
            warmup_lr_rate: kwargs.optional_number("warmup_lr_rate")?,
        },
        "polynomial" => polynomial(kwargs, base_lr)?,
        "inverse_sqrt" => {
            let default = if warmup > 0.0 { warmup } else { 10_000.0 };
            let timescale = kwargs.optional_number("timescale")?.unwrap_or(default);
            if timescale <= 0.0 {
                return Err(kwargs.error("timescale", "expected a number above 0"));
            }
            Shape::InverseSqrt { timescale }
        }
        "warmup_stable_decay" => warmup_stable_decay(kwargs, warmup, total)?,
        "reduce_lr_on_plateau" => {
            return Err(Error::config(
                "lr_scheduler_type",
                "reduce_lr_on_plateau follows a metric and has no rate per step; \
                 use PlateauSchedule",
            ));
        }
        "greedy" => {
            return Err(Error::config(
                "lr_scheduler_type",
                format!(
                    "greedy is not supported yet; expected one of {}",
                    SCHEDULE_NAMES.join(", ")
                ),
            ));
        }
        _ => {
            return Err(Error::config(
                "lr_scheduler_type",
                format!(
                    "unknown schedule `{name}`; expected one of {}{}",
                    SCHEDULE_NAMES.join(", "),
                    did_you_mean(name, SCHEDULE_NAMES)
                ),
            ));
        }
    })
}

fn min_lr_rate(kwargs: &mut Kwargs<'_>, base_lr: f64) -> Result<f64> {
    let min_lr = kwargs.optional_number("min_lr")?;
    let rate = kwargs.optional_number("min_lr_rate")?;
    match (min_lr, rate) {
        (Some(_), Some(_)) => Err(kwargs.error(
            "min_lr",
            "both min_lr and min_lr_rate are set; keep one of them",
        )),
        // A base rate of 0 stays 0 at every step, not 0 / 0.
        (Some(_), None) if base_lr == 0.0 => Ok(0.0),
        (Some(min_lr), None) => Ok(min_lr / base_lr),
        (None, Some(rate)) => Ok(rate),
        (None, None) => Err(kwargs.error(
            "min_lr",
            "needed by this schedule; set min_lr (a learning rate) or min_lr_rate (a share of \
             learning_rate)",
        )),
    }
}

fn polynomial(kwargs: &mut Kwargs<'_>, base_lr: f64) -> Result<Shape> {
    let lr_end = kwargs.number("lr_end", 1e-7)?;
    let power = kwargs.number("power", 1.0)?;
    if lr_end >= base_lr {
        return Err(kwargs.error(
            "lr_end",
            &format!("{lr_end} is not below learning_rate {base_lr}; lower it"),
        ));
    }
    Ok(Shape::Polynomial { lr_end, power })
}

fn warmup_stable_decay(kwargs: &mut Kwargs<'_>, warmup: f64, total: f64) -> Result<Shape> {
    let decay_steps = kwargs.optional_number("num_decay_steps")?.ok_or_else(|| {
        kwargs.error(
            "num_decay_steps",
            "needed by this schedule; set the number of steps over which the rate falls",
        )
    })?;
    let stable = kwargs.optional_number("num_stable_steps")?;
    Ok(Shape::WarmupStableDecay {
        stable_steps: stable.unwrap_or(total - warmup - decay_steps),
        decay_steps,
        warmup_type: curve(kwargs, "warmup_type", Curve::Linear)?,
        decay_type: curve(kwargs, "decay_type", Curve::Cosine)?,
        min_lr_ratio: kwargs.number("min_lr_ratio", 0.0)?,
        num_cycles: kwargs.number("num_cycles", 0.5)?,
    })
}

fn curve(kwargs: &mut Kwargs<'_>, key: &'static str, default: Curve) -> Result<Curve> {
    Ok(match kwargs.choice(key, &["linear", "cosine", "1-sqrt"])? {
        None => default,
        Some("linear") => Curve::Linear,
        Some("cosine") => Curve::Cosine,
        Some(_) => Curve::OneMinusSqrt,
    })
}
