//! Inverted dropout with a mask that is computed, never stored.
//!
//! ```text
//! out[t,c] = keep(t,c) ? x[t,c] / (1 - p) : 0
//! keep(t,c) = philox4x32([c / 4, position, sequence, step], seed)[c % 4] >= p * 2^32
//! ```
//!
//! `(sequence, position)` names the token of row t independently of where packing has put it, so
//! the mask is the same for any split of the tokens into rows, micro-batches and threads. What
//! changes from step to step is data, not an argument: a recorded launch draws anew. The
//! backward pass is the same function applied to the gradient. A dropped element is multiplied by
//! zero, as in PyTorch: NaN and infinity show as NaN.
//!
//! # Source
//! Srivastava et al.: "Dropout" (2014), scaled at training time; [`crate::rng::philox4x32`].

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::{check_len, check_shape};
use crate::row_blocks::{typed, typed_mut};
use crate::tensor::with_dtype;
use crate::{Error, Indices, Result, View, ViewMut};

/// What a mask depends on besides token and column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Key {
    /// Seed, already mixed with the place in the model.
    pub seed: u64,
    /// Probability that an element is dropped, in `[0, 1]`.
    pub p: f32,
}

/// Writes `x [T, D]` with its mask applied to `out [T, D]` (each f32 or bf16).
///
/// `rows [2 T + 1]` holds sequence id and position of every row, side by side, and last the step.
/// Also the backward pass: then `x` is the gradient of the output.
///
/// # Errors
/// If a shape or length differs or `key.p` is not in `[0, 1]`.
pub fn forward(x: View<'_>, key: Key, rows: &Indices<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "dropout::forward";
    let mask = checked_mask(OP, x, key, rows, &out)?;
    if let Some(device) = common(OP, &[x.device(), rows.device(), out.device()])? {
        return cuda::apply(device, "forward", x, mask, rows, out);
    }
    with_dtype!(x.dtype(), X => with_dtype!(out.dtype(), Y =>
        cpu::apply::<X, Y>(typed(x), mask, draws(rows), typed_mut(out), |_, masked| masked)
    ));
    Ok(())
}

/// The backward pass of [`forward`] (gradient `dy` to gradient `dx`), which is the same function.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: View<'_>, key: Key, rows: &Indices<'_>, dx: ViewMut<'_>) -> Result<()> {
    forward(dy, key, rows, dx)
}

/// Adds `d [T, D]` with its mask applied to `dx [T, D]` (each f32 or bf16).
///
/// # Errors
/// As [`forward`].
pub fn add_masked(dx: ViewMut<'_>, d: View<'_>, key: Key, rows: &Indices<'_>) -> Result<()> {
    const OP: &str = "dropout::add_masked";
    let mask = checked_mask(OP, d, key, rows, &dx)?;
    if let Some(device) = common(OP, &[d.device(), rows.device(), dx.device()])? {
        return cuda::apply(device, "add_masked", d, mask, rows, dx);
    }
    with_dtype!(d.dtype(), X => with_dtype!(dx.dtype(), Y =>
        cpu::apply::<X, Y>(typed(d), mask, draws(rows), typed_mut(dx), |sum, masked| sum + masked)
    ));
    Ok(())
}

/// (sequence id, position) of every row, and the step.
fn draws<'a>(rows: &'a Indices<'_>) -> cpu::Draws<'a> {
    let (step, pairs) = rows.split_last().unwrap_or((&0, &[]));
    cpu::Draws {
        tokens: bytemuck::cast_slice(pairs),
        step: *step,
    }
}

fn checked_mask(
    op: &'static str,
    x: View<'_>,
    key: Key,
    rows: &Indices<'_>,
    out: &ViewMut<'_>,
) -> Result<cpu::Mask> {
    check_shape(op, "the output", x.shape(), out.shape())?;
    check_len(op, "rows", 2 * x.rows() + 1, rows.len())?;
    if !(0.0..=1.0).contains(&key.p) {
        let message = format!("the probability p is {}, expected 0 to 1", key.p);
        return Err(Error::Invalid { op, message });
    }
    Ok(cpu::Mask::new(key))
}
