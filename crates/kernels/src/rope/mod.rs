//! Rotary position embedding, in place.
//!
//! With `h = rotary_dim / 2`, for every head and `i < h` (rotate-half pairing: `i` with `i + h`):
//!
//! ```text
//! forward   x[i]   <- x[i] cos[t,i] - x[i+h] sin[t,i]
//!           x[i+h] <- x[i+h] cos[t,i] + x[i] sin[t,i]
//! backward  the transpose: the same with -sin
//! ```
//!
//! Elements of a head from `rotary_dim` on stay as they are. cos and sin may carry a scale (YaRN,
//! longrope): the backward pass is the transpose, not the inverse.
//!
//! # Source
//! Su et al.: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2,
//! with the pairing of the Hugging Face models (`rotate_half`).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::row_blocks::typed_mut;
use crate::tensor::with_dtype;
use crate::{Error, Result, View, ViewMut};

/// Which way the rotation is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The rotation.
    Forward,
    /// Its transpose, which turns the gradient of the output into that of the input.
    Backward,
}

/// Rotates every head of `x [T, heads * head_dim]` (f32 or bf16) in place.
///
/// `cos` and `sin` are `[T, rotary_dim / 2]` f32, rows back to back: the angle of each row's position.
///
/// # Errors
/// If the columns are no multiple of `head_dim`, if `rotary_dim` is odd or above `head_dim`, or if
/// `cos` or `sin` has another shape.
pub fn apply(
    x: ViewMut<'_>,
    head_dim: usize,
    cos: View<'_>,
    sin: View<'_>,
    rotary_dim: usize,
    direction: Direction,
) -> Result<()> {
    const OP: &str = "rope::apply";
    let invalid = |message: String| Err(Error::Invalid { op: OP, message });
    if head_dim == 0 || !x.cols().is_multiple_of(head_dim) {
        return invalid(format!(
            "x has {} columns, expected a multiple of head_dim = {head_dim} (above 0)",
            x.cols()
        ));
    }
    if !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
        return invalid(format!(
            "rotary_dim is {rotary_dim}, expected an even number up to head_dim = {head_dim}"
        ));
    }
    let half = rotary_dim / 2;
    check_shape(OP, "cos", [x.rows(), half], cos.shape())?;
    check_shape(OP, "sin", [x.rows(), half], sin.shape())?;
    if half == 0 {
        return Ok(());
    }
    let (cos, sin) = (cos.dense_f32(OP, "cos")?, sin.dense_f32(OP, "sin")?);
    if let Some(device) = common(OP, &[x.device(), cos.device(), sin.device()])? {
        return cuda::apply(device, x, head_dim, cos, sin, direction);
    }
    let (cos, sin) = (cos.contiguous(OP, "cos")?, sin.contiguous(OP, "sin")?);
    let angles = cpu::Angles { cos, sin, half };
    with_dtype!(x.dtype(), X => match direction {
        Direction::Forward => cpu::apply::<X, false>(typed_mut(x), head_dim, angles),
        Direction::Backward => cpu::apply::<X, true>(typed_mut(x), head_dim, angles),
    });
    Ok(())
}
