//! RMSNorm of every head of q or k, and RoPE behind it, in one pass over memory.
//!
//! With E the width of a head, `h = rotary_dim / 2`, for every row t and head n:
//!
//! ```text
//! rstd    = 1 / sqrt(mean_i(x[i]^2) + eps)
//! y[i]    = x[i] rstd (weight[i] + offset)
//! out     = y, with the pairs (i, i + h) of i < h rotated as in `rope`
//! backward, in place on d_out:
//! dy      = d_out, rotated back (the transpose)
//! d_weight[i] += sum over rows and heads of dy[i] x[i] rstd
//! dx[i]   = rstd (g[i] - x[i] rstd^2 mean_j(g[j] x[j])),  g[i] = dy[i] (weight[i] + offset)
//! ```
//!
//! Data is f32 or bf16, each argument its own; the weight, statistics and arithmetic are f32, rounded
//! once at the end.
//!
//! # Source
//! Henry et al.: "Query-Key Normalization for Transformers" (2020), with RMSNorm as in the Qwen 3
//! (`offset` 0) and Gemma 3 (`offset` 1) models of Hugging Face.

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
use crate::{Error, Result, View, ViewMut, Workspace};

/// The norm of a head, and the angles of its rotation.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[1, E]` f32: factor of each element, but for `offset`.
    pub weight: View<'a>,
    /// Added to the weight: 0, or 1 where the weight is stored as its distance from 1.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
    /// Cosines of each row's angles, `[T, rotary_dim / 2]` f32, rows back to back.
    pub cos: View<'a>,
    /// Sines.
    pub sin: View<'a>,
}

impl<'a> Norm<'a> {
    /// Width of a head.
    fn head_dim(&self) -> usize {
        self.weight.cols()
    }

    /// Refuses what does not fit `x [T, heads * E]`; the same with vectors known to be dense.
    fn checked(self, op: &'static str, x: View<'_>) -> Result<Norm<'a>> {
        let (head_dim, half) = (self.head_dim(), self.cos.cols());
        if head_dim == 0 || !x.cols().is_multiple_of(head_dim) {
            let message = format!(
                "x has {} columns, expected a multiple of the {head_dim} weights (above 0)",
                x.cols()
            );
            return Err(Error::Invalid { op, message });
        }
        if 2 * half > head_dim {
            let message = format!("cos has {half} columns, expected at most half of {head_dim}");
            return Err(Error::Invalid { op, message });
        }
        check_shape(op, "weight", [1, head_dim], self.weight.shape())?;
        check_shape(op, "cos", [x.rows(), half], self.cos.shape())?;
        check_shape(op, "sin", [x.rows(), half], self.sin.shape())?;
        Ok(Norm {
            weight: self.weight.dense_f32(op, "weight")?,
            cos: self.cos.dense_f32(op, "cos")?,
            sin: self.sin.dense_f32(op, "sin")?,
            ..self
        })
    }

    fn on_host(&self, op: &'static str) -> Result<cpu::Norm<'a>> {
        let weight = self.weight.contiguous(op, "weight")?;
        Ok(cpu::Norm {
            weight: weight.iter().map(|w| w + self.offset).collect(),
            eps: self.eps,
            cos: self.cos.contiguous(op, "cos")?,
            sin: self.sin.contiguous(op, "sin")?,
            half: self.cos.cols(),
        })
    }
}

/// Writes the normed and rotated heads of `x [T, heads * E]` to `out`, of the same shape.
///
/// # Errors
/// If the columns are no multiple of E, or a shape differs from the ones above.
pub fn forward(x: View<'_>, norm: &Norm<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "qk_norm::forward";
    check_shape(OP, "out", x.shape(), out.shape())?;
    let norm = norm.checked(OP, x)?;
    let vectors = [norm.weight, norm.cos, norm.sin].map(|v| v.device());
    let [weight, cos, sin] = vectors;
    if let Some(device) = common(OP, &[x.device(), weight, cos, sin, out.device()])? {
        return cuda::forward(device, x, &norm, out);
    }
    let norm = norm.on_host(OP)?;
    with_dtype!(x.dtype(), X => with_dtype!(out.dtype(), Y =>
        cpu::forward::<X, Y>(typed(x), &norm, typed_mut(out))
    ));
    Ok(())
}

/// Replaces `d [T, heads * E]`, the gradient of the output, by that of `x`; adds the gradient of the
/// weight to `d_weight [1, E]` f32, `None` for a frozen one.
///
/// # Errors
/// If the columns are no multiple of E, or a shape differs from the ones above.
pub fn backward_in_place(
    d: ViewMut<'_>,
    x: View<'_>,
    norm: &Norm<'_>,
    d_weight: Option<ViewMut<'_>>,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "qk_norm::backward_in_place";
    check_shape(OP, "d", x.shape(), d.shape())?;
    let norm = norm.checked(OP, x)?;
    if let Some(d_weight) = &d_weight {
        check_shape(OP, "d_weight", [1, norm.head_dim()], d_weight.shape())?;
    }
    let d_weight = d_weight.map(|d| d.dense_f32(OP, "d_weight")).transpose()?;
    let mut devices = vec![d.device(), x.device()];
    devices.extend([norm.weight, norm.cos, norm.sin].map(|v| v.device()));
    devices.extend(d_weight.as_ref().map(ViewMut::device));
    if let Some(device) = common(OP, &devices)? {
        return cuda::backward_in_place(device, d, x, &norm, d_weight, workspace);
    }
    let norm = norm.on_host(OP)?;
    let d_weight = d_weight.map(|d| d.contiguous(OP, "d_weight")).transpose()?;
    with_dtype!(d.dtype(), G => with_dtype!(x.dtype(), X =>
        cpu::backward_in_place::<G, X>(typed_mut(d), typed(x), &norm, d_weight)
    ));
    Ok(())
}
