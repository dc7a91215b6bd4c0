//! Bias of a linear.
//!
//! Forward: `y[t, o] += b[o]`. Backward: `db[o] += sum_t dy[t, o]`.

mod cpu;
#[cfg(test)]
mod tests;

use crate::error::check_len;
use crate::tensor::with_dtype;
use crate::{Result, View, ViewMut};

/// Adds `bias` `[O]` f32 to each row of `y` `[T, O]`, f32 or bf16.
///
/// # Errors
/// If the lengths differ.
pub fn add(y: ViewMut<'_>, bias: &[f32]) -> Result<()> {
    check_len("bias::add", "bias", y.cols(), bias.len())?;
    with_dtype!(y.dtype(), T => {
        if let Some(y) = y.typed::<T>() {
            cpu::add(y, bias);
        }
    });
    Ok(())
}

/// Adds the column sums of `dy` `[T, O]`, f32 or bf16, to `d_bias` `[O]`.
///
/// Rows are summed in order, so the bits do not depend on the number of threads.
///
/// # Errors
/// If the lengths differ.
pub fn backward(dy: View<'_>, d_bias: &mut [f32]) -> Result<()> {
    check_len("bias::backward", "d_bias", dy.cols(), d_bias.len())?;
    with_dtype!(dy.dtype(), T => {
        if let Some(dy) = dy.typed::<T>() {
            cpu::backward(dy, d_bias);
        }
    });
    Ok(())
}
