//! Dropout of whole parts of an update, drawn once per optimizer step and linear.
//!
//! ```text
//! rows:    stays[i] = u_0 >= p_module and u_(i+1) >= p_rows        out[i] = stays[i] * (scaled ? rows / sum stays : 1)
//! blocks:  out[b] = 0 for `left_out` blocks, the first of them shuffled (Fisher and Yates), else 1
//! ```
//!
//! u_n is the n-th number of the [`Stream`] of the site's key, mixed with the step. The step is data, not an argument: a
//! recorded launch draws anew.
//!
//! # Source
//! Srivastava et al.: "Dropout" (2014); [`crate::rng::Stream`].

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::rng::{Stream, mix};
use crate::{Device, Error, Indices, Result, ViewMut};
use std::sync::Arc;

/// What is drawn at a site in a step.
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    /// Of the site, already mixed with the seed.
    pub key: u64,
    /// Of which the last value is the step.
    pub steps: &'a Indices<'a>,
}

impl Draws<'_> {
    /// Where what is drawn is wanted.
    #[must_use]
    pub fn device(&self) -> Device {
        match self.steps.device() {
            Some(device) => Device::Cuda(Arc::clone(device)),
            None => Device::Cpu,
        }
    }

    /// The numbers, on the host.
    #[must_use]
    pub fn stream(&self) -> Stream {
        let step = self.steps.last().copied().unwrap_or_default();
        Stream::new(mix(self.key, u64::from(step)))
    }
}

/// Which rows are left out.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Probability that a row is.
    pub rows: f64,
    /// Probability that all are.
    pub module: f64,
    /// Whether the rows that stay grow so that factors are 1 on average over the rows.
    pub scaled: bool,
}

/// Which blocks are left out.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    /// So many.
    pub left_out: usize,
    /// Number of groups of blocks, of which one is drawn first where there are several.
    pub groups: usize,
    /// The group whose factors are asked for.
    pub group: usize,
}

/// Writes a factor for each row to `out [rows, 1]`, f32.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn rows(out: ViewMut<'_>, draws: Draws<'_>, of: Rows) -> Result<()> {
    const OP: &str = "parts::rows";
    let out = checked(OP, out, draws)?;
    if let Some(device) = common(OP, &[out.device(), draws.steps.device()])? {
        return cuda::rows(device, out, draws, of);
    }
    cpu::rows(out.contiguous(OP, "out")?, draws.stream(), of);
    Ok(())
}

/// Writes a factor for each block, 0 or 1, to `out [blocks, 1]`, f32.
///
/// # Errors
/// If a shape or dtype does not fit, or more blocks are left out than there are.
pub fn blocks(out: ViewMut<'_>, draws: Draws<'_>, of: Blocks) -> Result<()> {
    const OP: &str = "parts::blocks";
    if of.left_out > out.rows() || of.group >= of.groups {
        let message = format!("{of:?} of {} blocks", out.rows());
        return Err(Error::Invalid { op: OP, message });
    }
    let out = checked(OP, out, draws)?;
    if let Some(device) = common(OP, &[out.device(), draws.steps.device()])? {
        return cuda::blocks(device, out, draws, of);
    }
    cpu::blocks(out.contiguous(OP, "out")?, draws.stream(), of);
    Ok(())
}

/// `out`, if it is a column, and there is a step.
fn checked<'a>(op: &'static str, out: ViewMut<'a>, draws: Draws<'_>) -> Result<ViewMut<'a>> {
    check_shape(op, "out", [out.rows(), 1], out.shape())?;
    if draws.steps.is_empty() {
        let message = "there is no step".into();
        return Err(Error::Invalid { op, message });
    }
    out.dense_f32(op, "out")
}
