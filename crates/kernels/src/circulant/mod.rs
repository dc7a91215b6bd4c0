//! Matrices of circulant blocks, added to another.
//!
//! ```text
//! out[m*b + i, n*b + j] += alpha * kernel[m, n*b + t]        t = (j - i) mod b, or (j + i) mod b reflected
//! d_kernel[m, n*b + t] += alpha * sum_i d[m*b + i, n*b + j]  j = (t + i) mod b
//! ```
//!
//! `kernel [rows / b, cols]` has the first row of each block `[b, b]`. Everything is f32; sums are in a fixed
//! order.
//!
//! # Source
//! Chen et al.: "Parameter-Efficient Fine-Tuning via Circular Convolution" (2024), for what it is used for.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::{check_dtype, check_shape};
use crate::row_blocks::{typed, typed_mut};
use crate::{DType, Error, Result, View, ViewMut};

/// Which element of the kernel stands at row i and column j of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// That of j - i: each row is the one above it, moved to the right.
    Circulant,
    /// That of j + i: each row is the one above it, moved to the left.
    Reflected,
}

/// `out += alpha` times the matrix of blocks `[block, block]` that `kernel` describes.
///
/// # Errors
/// If `block` does not divide both sides of `out`, a shape does not fit, or a dtype is not f32.
pub fn add(
    out: ViewMut<'_>,
    alpha: f32,
    kernel: View<'_>,
    block: usize,
    order: Order,
) -> Result<()> {
    const OP: &str = "circulant::add";
    check_dtype(OP, "out", DType::F32, out.dtype())?;
    check_blocks(OP, out.shape(), block, kernel.shape())?;
    let kernel = kernel.dense_f32(OP, "kernel")?;
    if let Some(device) = common(OP, &[out.device(), kernel.device()])? {
        return cuda::add(device, out, alpha, kernel, block, order);
    }
    let kernel = kernel.contiguous(OP, "kernel")?;
    cpu::add(typed_mut(out), alpha, kernel, block, order);
    Ok(())
}

/// Adds to `d_kernel` the gradient of the kernel of a circulant, from that of the matrix, `d`.
///
/// # Errors
/// As [`add`].
pub fn add_gradient(d_kernel: ViewMut<'_>, alpha: f32, d: View<'_>, block: usize) -> Result<()> {
    const OP: &str = "circulant::add_gradient";
    check_dtype(OP, "d", DType::F32, d.dtype())?;
    check_blocks(OP, d.shape(), block, d_kernel.shape())?;
    let d_kernel = d_kernel.dense_f32(OP, "d_kernel")?;
    if let Some(device) = common(OP, &[d_kernel.device(), d.device()])? {
        return cuda::add_gradient(device, d_kernel, alpha, d, block);
    }
    let d_kernel = d_kernel.contiguous(OP, "d_kernel")?;
    cpu::add_gradient(d_kernel, alpha, typed(d), block);
    Ok(())
}

fn check_blocks(
    op: &'static str,
    [rows, cols]: [usize; 2],
    block: usize,
    kernel: [usize; 2],
) -> Result<()> {
    if block == 0 || !rows.is_multiple_of(block) || !cols.is_multiple_of(block) {
        let message = format!("blocks of {block} do not divide a matrix of {rows} x {cols}");
        return Err(Error::Invalid { op, message });
    }
    check_shape(
        op,
        "kernel [rows / block, cols]",
        [rows / block, cols],
        kernel,
    )
}
