//! Bias of a linear.
//!
//! Forward: `y[t, o] += scale * b[o]`. Backward: `db[o] += scale * sum_t dy[t, o]`. Without a scale it is 1.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::tensor::with_dtype;
use crate::{Result, View, ViewMut};

/// Adds `bias` `[1, O]` f32 to each row of `y` `[T, O]`, f32 or bf16.
///
/// # Errors
/// If the shapes differ.
pub fn add(y: ViewMut<'_>, bias: View<'_>) -> Result<()> {
    add_scaled(y, 1.0, bias)
}

/// Adds `scale` times `bias` `[1, O]` f32 to each row of `y` `[T, O]`, f32 or bf16.
///
/// # Errors
/// If the shapes differ.
pub fn add_scaled(y: ViewMut<'_>, scale: f32, bias: View<'_>) -> Result<()> {
    const OP: &str = "bias::add";
    check_shape(OP, "bias", [1, y.cols()], bias.shape())?;
    let bias = bias.dense_f32(OP, "bias")?;
    if let Some(device) = common(OP, &[y.device(), bias.device()])? {
        return cuda::add(device, y, scale, bias);
    }
    let bias = bias.contiguous(OP, "bias")?;
    with_dtype!(y.dtype(), T => {
        if let Some(y) = y.typed::<T>() {
            cpu::add(y, scale, bias);
        }
    });
    Ok(())
}

/// Adds the column sums of `dy` `[T, O]`, f32 or bf16, to `d_bias` `[1, O]` f32.
///
/// Rows are summed in order, so the bits do not depend on the number of threads.
///
/// # Errors
/// If the shapes differ.
pub fn backward(dy: View<'_>, d_bias: ViewMut<'_>) -> Result<()> {
    backward_scaled(dy, 1.0, d_bias)
}

/// Adds `scale` times the column sums of `dy` `[T, O]`, f32 or bf16, to `d_bias` `[1, O]` f32.
///
/// # Errors
/// If the shapes differ.
pub fn backward_scaled(dy: View<'_>, scale: f32, d_bias: ViewMut<'_>) -> Result<()> {
    const OP: &str = "bias::backward";
    check_shape(OP, "d_bias", [1, dy.cols()], d_bias.shape())?;
    let d_bias = d_bias.dense_f32(OP, "d_bias")?;
    if let Some(device) = common(OP, &[dy.device(), d_bias.device()])? {
        return cuda::backward(device, dy, scale, d_bias);
    }
    let d_bias = d_bias.contiguous(OP, "d_bias")?;
    with_dtype!(dy.dtype(), T => {
        if let Some(dy) = dy.typed::<T>() {
            cpu::backward(dy, scale, d_bias);
        }
    });
    Ok(())
}
