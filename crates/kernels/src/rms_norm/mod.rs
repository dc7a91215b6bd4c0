//! Root-mean-square normalisation, alone or fused with the residual addition before it.
//!
//! ```text
//! rstd[t]  = 1 / sqrt(mean_d(x[t,d]^2) + eps)
//! y[t,d]   = x[t,d] * rstd[t] * weight[d]
//! dx[t,d] += rstd[t] * (g[t,d] - x[t,d] * rstd[t]^2 * mean_d(g[t,d] x[t,d])),  g = dy * weight
//! d_weight[d] += sum_t dy[t,d] * x[t,d] * rstd[t]
//! ```
//!
//! T is the number of rows (packed tokens), D the number of columns (hidden size). Data is f32 or
//! bf16, each argument its own; weight, statistics and arithmetic are f32, rounded once at the end.
//!
//! # Source
//! Zhang, Sennrich: "Root Mean Square Layer Normalization" (2019), equation 4; `eps` under the
//! root as in the Hugging Face Llama models. Those round `x * rstd` to bf16 before they multiply
//! by the weight, which loses accuracy and is not imitated here.

mod cpu;
#[cfg(test)]
mod tests;

use crate::error::{check_len, check_shape};
use crate::row_blocks::{typed, typed_mut};
use crate::tensor::with_dtype;
use crate::{Result, View, ViewMut};

/// Normalises every row of `x [T, D]` into `y [T, D]`; `rstd [T]` is kept for the backward pass.
///
/// # Errors
/// If a shape or length differs from the ones above.
pub fn forward(
    x: View<'_>,
    weight: &[f32],
    eps: f32,
    y: ViewMut<'_>,
    rstd: &mut [f32],
) -> Result<()> {
    const OP: &str = "rms_norm::forward";
    check_shape(OP, "y", x.shape(), y.shape())?;
    check_len(OP, "weight", x.cols(), weight.len())?;
    check_len(OP, "rstd", x.rows(), rstd.len())?;
    with_dtype!(x.dtype(), X => with_dtype!(y.dtype(), Y =>
        cpu::forward::<X, Y>(typed(x), weight, eps, typed_mut(y), rstd)
    ));
    Ok(())
}

/// `residual += branch`, then [`forward`] of the residual, in one pass over memory.
///
/// All matrices are `[T, D]`. The statistics are those of the residual as it is stored, rounded to
/// its dtype, so that [`apply`] to it repeats `y`.
///
/// # Errors
/// If a shape or length differs.
pub fn add_forward(
    residual: ViewMut<'_>,
    branch: View<'_>,
    weight: &[f32],
    eps: f32,
    y: ViewMut<'_>,
    rstd: &mut [f32],
) -> Result<()> {
    const OP: &str = "rms_norm::add_forward";
    check_shape(OP, "branch", residual.shape(), branch.shape())?;
    check_shape(OP, "y", residual.shape(), y.shape())?;
    check_len(OP, "weight", residual.cols(), weight.len())?;
    check_len(OP, "rstd", residual.rows(), rstd.len())?;
    with_dtype!(residual.dtype(), R => with_dtype!(branch.dtype(), B => with_dtype!(y.dtype(), Y =>
        cpu::add_forward::<R, B, Y>(
            typed_mut(residual), typed(branch), weight, eps, typed_mut(y), rstd,
        )
    )));
    Ok(())
}

/// Recomputes `y [T, D]` from `x [T, D]` and the `rstd [T]` that [`forward`] kept: the same bits.
///
/// # Errors
/// If a shape or length differs.
pub fn apply(x: View<'_>, weight: &[f32], rstd: &[f32], y: ViewMut<'_>) -> Result<()> {
    const OP: &str = "rms_norm::apply";
    check_shape(OP, "y", x.shape(), y.shape())?;
    check_len(OP, "weight", x.cols(), weight.len())?;
    check_len(OP, "rstd", x.rows(), rstd.len())?;
    with_dtype!(x.dtype(), X => with_dtype!(y.dtype(), Y =>
        cpu::apply::<X, Y>(typed(x), weight, rstd, typed_mut(y))
    ));
    Ok(())
}

/// Adds the gradient of the input to `dx [T, D]` and that of the weight to `d_weight [D]`.
///
/// `dy` and `x` are `[T, D]`, `rstd` is `[T]`. `d_weight` is `None` for a frozen weight.
///
/// # Errors
/// If a shape or length differs.
pub fn backward(
    dy: View<'_>,
    x: View<'_>,
    weight: &[f32],
    rstd: &[f32],
    dx: ViewMut<'_>,
    d_weight: Option<&mut [f32]>,
) -> Result<()> {
    const OP: &str = "rms_norm::backward";
    check_shape(OP, "dy", x.shape(), dy.shape())?;
    check_shape(OP, "dx", x.shape(), dx.shape())?;
    check_len(OP, "weight", x.cols(), weight.len())?;
    check_len(OP, "rstd", x.rows(), rstd.len())?;
    if let Some(d_weight) = &d_weight {
        check_len(OP, "d_weight", x.cols(), d_weight.len())?;
    }
    with_dtype!(dy.dtype(), G => with_dtype!(x.dtype(), X => with_dtype!(dx.dtype(), D =>
        cpu::backward::<G, X, D>(typed(dy), typed(x), weight, rstd, typed_mut(dx), d_weight)
    )));
    Ok(())
}
