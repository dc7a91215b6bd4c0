//! Scaled sums.
//!
//! ```text
//! y[t,d] = a * y[t,d] + b * x[t,d]        y[t,d] = a * y[t,d]
//! ```
//!
//! Data is f32 or bf16, each argument its own; arithmetic is f32, rounded once. With `a` 0 what `y`
//! holds is not read.
//!
//! # Source
//! The `axpby` of BLAS extensions.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::row_blocks::{typed, typed_mut};
use crate::tensor::with_dtype;
use crate::{Result, View, ViewMut};

/// `y = a y + b x`, matrices of one shape.
///
/// # Errors
/// If the shapes differ.
pub fn add(a: f32, y: ViewMut<'_>, b: f32, x: View<'_>) -> Result<()> {
    const OP: &str = "axpby::add";
    check_shape(OP, "x", y.shape(), x.shape())?;
    if let Some(device) = common(OP, &[y.device(), x.device()])? {
        return cuda::add(device, a, y, b, x);
    }
    with_dtype!(y.dtype(), Y => with_dtype!(x.dtype(), X =>
        cpu::add::<Y, X>(a, typed_mut(y), b, typed(x))
    ));
    Ok(())
}

/// `y = a y`.
///
/// # Errors
/// If a GPU has failed.
pub fn scale(a: f32, y: ViewMut<'_>) -> Result<()> {
    if let Some(device) = y.device() {
        return cuda::scale(device, a, y);
    }
    with_dtype!(y.dtype(), Y => cpu::scale::<Y>(a, typed_mut(y)));
    Ok(())
}
