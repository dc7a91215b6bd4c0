//! Products with a block-diagonal matrix.
//!
//! ```text
//! y[r, b*n + i] = sum_j x[r, b*n + j] * m[b*n + i, j]        m [blocks * n, n]
//! dm[b*n + i, j] = sum_r dy[r, b*n + i] * x[r, b*n + j]
//! ```
//!
//! That is `y = x M^T` and `dM = dy^T x` with M `[blocks * n, blocks * n]` of which only the blocks on the
//! diagonal are made. Everything is f32.
//!
//! # Source
//! Qiu et al.: "Orthogonal Finetuning Made Scalable" (2025), for what it is used for.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::{check_dtype, check_shape};
use crate::{DType, Error, Result, View, ViewMut};

/// Writes `y = x M^T`, both `[rows, blocks * n]`, with `blocks [blocks * n, n]`.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn product(y: ViewMut<'_>, x: View<'_>, blocks: View<'_>) -> Result<()> {
    const OP: &str = "block_diagonal::product";
    check(OP, x, blocks.shape())?;
    check_shape(OP, "y", x.shape(), y.shape())?;
    check_dtype(OP, "y", DType::F32, y.dtype())?;
    let blocks = blocks.dense_f32(OP, "blocks")?;
    match common(OP, &[y.device(), x.device(), blocks.device()])? {
        Some(device) => cuda::product(device, y, x, blocks),
        None => cpu::product(y, x, blocks),
    }
}

/// Writes to `d_blocks [blocks * n, n]` the gradient of M, from `dy` and `x`, both `[rows, blocks * n]`.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn gradient(d_blocks: ViewMut<'_>, dy: View<'_>, x: View<'_>) -> Result<()> {
    const OP: &str = "block_diagonal::gradient";
    check(OP, x, d_blocks.shape())?;
    check_shape(OP, "dy", x.shape(), dy.shape())?;
    check_dtype(OP, "dy", DType::F32, dy.dtype())?;
    let d_blocks = d_blocks.dense_f32(OP, "d_blocks")?;
    match common(OP, &[d_blocks.device(), dy.device(), x.device()])? {
        Some(device) => cuda::gradient(device, d_blocks, dy, x),
        None => cpu::gradient(d_blocks, dy, x),
    }
}

/// Whether `x` has as many columns as blocks of this shape below one another have rows.
fn check(op: &'static str, x: View<'_>, [rows, n]: [usize; 2]) -> Result<()> {
    check_dtype(op, "x", DType::F32, x.dtype())?;
    check_shape(op, "x", [x.rows(), rows], x.shape())?;
    if n == 0 || rows % n > 0 {
        let message = format!("{rows} rows are no whole blocks of {n} columns");
        return Err(Error::Invalid { op, message });
    }
    Ok(())
}
