//! Uniform noise on rows, a scale for each: NEFTune's, on embeddings.
//!
//! ```text
//! x[t,c] += scale[t] * u(t,c)
//! u(t,c) = 2^-31 * philox4x32([c / 4, position, sequence, step], seed)[c % 4] - 1
//! ```
//!
//! `u` lies in `[-1, 1]`. As in [`crate::dropout`], `(sequence, position)` names the token of row t, so
//! the noise is the same for any split of the tokens into rows, micro-batches and threads, and the step
//! is data. The gradient passes unchanged.
//!
//! # Source
//! Jain et al.: "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (2023).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_len;
use crate::row_blocks::typed_mut;
use crate::tensor::with_dtype;
use crate::{Indices, Result, ViewMut};

/// Adds noise to `x [T, D]` (f32 or bf16).
///
/// `rows [2 T + 1]` holds sequence id and position of every row, side by side, and last the step;
/// `scales [T]` the bits of an f32 for each row. `seed` is mixed with the place in the model.
///
/// # Errors
/// If a length differs.
pub fn add(x: ViewMut<'_>, seed: u64, rows: &Indices<'_>, scales: &Indices<'_>) -> Result<()> {
    const OP: &str = "noise::add";
    check_len(OP, "rows", 2 * x.rows() + 1, rows.len())?;
    check_len(OP, "scales", x.rows(), scales.len())?;
    let key = [seed as u32, (seed >> 32) as u32];
    if let Some(device) = common(OP, &[x.device(), rows.device(), scales.device()])? {
        return cuda::add(device, x, key, rows, scales);
    }
    with_dtype!(x.dtype(), X => cpu::add::<X>(typed_mut(x), key, rows, scales));
    Ok(())
}
