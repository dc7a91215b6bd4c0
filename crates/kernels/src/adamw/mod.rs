//! AdamW and the gradient norm, on the flat parameter buffer.
//!
//! With `g = grad * grad_scale` and the scalars of a group computed in f64:
//!
//! ```text
//! p <- p * (1 - lr * weight_decay)
//! m <- beta1 m + (1 - beta1) g
//! v <- beta2 v + (1 - beta2) g^2
//! p <- p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//! ```
//!
//! # Source
//! Loshchilov, Hutter: "Decoupled Weight Decay Regularization" (2019), in the form and order of
//! `torch.optim.AdamW` (`amsgrad=False`), whose state is f32 too.

mod cpu;
pub mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::error::check_len;
use crate::{Error, Result};
use std::ops::Range;

/// The constants of AdamW. The default is PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment per step, in `[0, 1)`.
    pub beta1: f64,
    /// Decay of the second moment per step, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

/// Parameters that share learning rate, decay and step count.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Which elements of the flat buffer.
    pub range: Range<usize>,
    /// Learning rate of this step.
    pub lr: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// Number of this update of the group, from 1.
    pub step: u64,
}

/// Euclidean norm of `grads`, summed in f64: the same bits for any number of threads.
///
/// NaN or infinity in, NaN or infinity out.
#[must_use]
pub fn global_norm(grads: &[f32]) -> f64 {
    cpu::sum_of_squares(grads).sqrt()
}

/// One update of the parameters of all `groups`, in place; elements of no group stay as they are.
///
/// `params`, `grads`, `m` and `v` are slices of the same length; the gradient used is
/// `grads * grad_scale` (1 / tokens, times the factor of clipping). Groups come in any order.
///
/// # Errors
/// If lengths differ, a group leaves the buffer, overlaps another or has step 0, or a constant is
/// out of its range; nothing is then changed.
pub fn step(
    cfg: &AdamW,
    params: &mut [f32],
    grads: &[f32],
    grad_scale: f32,
    m: &mut [f32],
    v: &mut [f32],
    groups: &[Group],
) -> Result<()> {
    const OP: &str = "adamw::step";
    check_len(OP, "grads", params.len(), grads.len())?;
    check_len(OP, "m", params.len(), m.len())?;
    check_len(OP, "v", params.len(), v.len())?;
    check_config(OP, cfg)?;
    let mut ordered: Vec<&Group> = groups.iter().filter(|g| !g.range.is_empty()).collect();
    ordered.sort_by_key(|group| group.range.start);
    check_groups(OP, &ordered, params.len())?;
    cpu::step(cfg, params, grads, grad_scale, m, v, &ordered);
    Ok(())
}

fn check_config(op: &'static str, cfg: &AdamW) -> Result<()> {
    let unit = 0.0..1.0;
    let valid = unit.contains(&cfg.beta1) && unit.contains(&cfg.beta2) && cfg.eps >= 0.0;
    if valid {
        return Ok(());
    }
    let message = format!("expected beta1 and beta2 in [0, 1) and eps of at least 0, got {cfg:?}");
    Err(Error::Invalid { op, message })
}

fn check_groups(op: &'static str, ordered: &[&Group], len: usize) -> Result<()> {
    let invalid = |message: String| Err(Error::Invalid { op, message });
    let mut covered = 0;
    for group in ordered {
        let range = &group.range;
        if range.end > len {
            return invalid(format!("group {range:?} ends after the {len} parameters"));
        }
        if range.start < covered {
            return invalid(format!(
                "group {range:?} overlaps the one before it, which ends at {covered}"
            ));
        }
        if group.step == 0 {
            return invalid(format!(
                "group {range:?} has step 0, but steps count from 1"
            ));
        }
        covered = range.end;
    }
    Ok(())
}
