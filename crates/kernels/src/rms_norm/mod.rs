//! Root-mean-square normalisation, alone or fused with the residual addition before it.
//!
//! ```text
//! rstd[t]  = 1 / sqrt(mean_d(x[t,d]^2) + eps)
//! y[t,d]   = x[t,d] * rstd[t] * w[d],  w = weight + offset
//! dx[t,d] += rstd[t] * (g[t,d] - x[t,d] * rstd[t]^2 * mean_d(g[t,d] x[t,d])),  g = dy * w
//! d_weight[d] += sum_t dy[t,d] * x[t,d] * rstd[t]
//! ```
//!
//! T is the number of rows (packed tokens), D the number of columns (hidden size). Data is f32 or
//! bf16, each argument its own; weight `[1, D]`, statistics and arithmetic are f32, rounded once at
//! the end.
//!
//! # Source
//! Zhang, Sennrich: "Root Mean Square Layer Normalization" (2019), equation 4; `eps` under the
//! root as in the Hugging Face Llama models. Those round `x * rstd` to bf16 before they multiply
//! by the weight, which loses accuracy and is not imitated here. `offset` 1 is that of the Gemma models.

pub(crate) mod cpu;
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
use cuda::Statistics;
use std::borrow::Cow;

/// The factor of each column, but for `offset`.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// `[1, D]` f32.
    pub values: View<'a>,
    /// Added to the values: 0, or 1 where they are stored as their distance from 1.
    pub offset: f32,
}

impl<'a> From<View<'a>> for Weight<'a> {
    fn from(values: View<'a>) -> Self {
        Self {
            values,
            offset: 0.0,
        }
    }
}

impl<'a> Weight<'a> {
    /// Refuses all but `cols` f32 back to back.
    fn checked(self, op: &'static str, cols: usize) -> Result<Self> {
        check_shape(op, "weight", [1, cols], self.values.shape())?;
        let values = self.values.dense_f32(op, "weight")?;
        Ok(Self { values, ..self })
    }

    /// The factors in host memory.
    fn on_host(self, op: &'static str) -> Result<Cow<'a, [f32]>> {
        let values = self.values.contiguous(op, "weight")?;
        if self.offset == 0.0 {
            return Ok(values.into());
        }
        Ok(values.iter().map(|w| w + self.offset).collect())
    }
}

/// Normalises every row of `x [T, D]` into `y [T, D]`; `rstd [T, 1]` is kept for the backward pass.
///
/// # Errors
/// If a shape or length differs from the ones above.
pub fn forward<'a>(
    x: View<'_>,
    weight: impl Into<Weight<'a>>,
    eps: f32,
    y: ViewMut<'_>,
    rstd: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "rms_norm::forward";
    check_shape(OP, "y", x.shape(), y.shape())?;
    let weight = weight.into().checked(OP, x.cols())?;
    check_shape(OP, "rstd", [x.rows(), 1], rstd.shape())?;
    let rstd = rstd.dense_f32(OP, "rstd")?;
    let devices = [
        x.device(),
        weight.values.device(),
        y.device(),
        rstd.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::forward(
            device,
            "forward",
            x,
            y,
            Statistics {
                weight,
                eps,
                rstd: rstd.as_view(),
            },
        );
    }
    let (weight, rstd) = (&weight.on_host(OP)?, rstd.contiguous(OP, "rstd")?);
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
pub fn add_forward<'a>(
    residual: ViewMut<'_>,
    branch: View<'_>,
    weight: impl Into<Weight<'a>>,
    eps: f32,
    y: ViewMut<'_>,
    rstd: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "rms_norm::add_forward";
    check_shape(OP, "branch", residual.shape(), branch.shape())?;
    check_shape(OP, "y", residual.shape(), y.shape())?;
    let weight = weight.into().checked(OP, residual.cols())?;
    check_shape(OP, "rstd", [residual.rows(), 1], rstd.shape())?;
    let rstd = rstd.dense_f32(OP, "rstd")?;
    let devices = [
        residual.device(),
        branch.device(),
        weight.values.device(),
        y.device(),
        rstd.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_forward(
            device,
            residual,
            branch,
            y,
            Statistics {
                weight,
                eps,
                rstd: rstd.as_view(),
            },
        );
    }
    let (weight, rstd) = (&weight.on_host(OP)?, rstd.contiguous(OP, "rstd")?);
    with_dtype!(residual.dtype(), R => with_dtype!(branch.dtype(), B => with_dtype!(y.dtype(), Y =>
        cpu::add_forward::<R, B, Y>(
            typed_mut(residual), typed(branch), weight, eps, typed_mut(y), rstd,
        )
    )));
    Ok(())
}

/// Recomputes `y [T, D]` from `x [T, D]` and the `rstd [T, 1]` that [`forward`] kept: the same bits.
///
/// # Errors
/// If a shape or length differs.
pub fn apply<'a>(
    x: View<'_>,
    weight: impl Into<Weight<'a>>,
    rstd: View<'_>,
    y: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "rms_norm::apply";
    check_shape(OP, "y", x.shape(), y.shape())?;
    let weight = weight.into().checked(OP, x.cols())?;
    check_shape(OP, "rstd", [x.rows(), 1], rstd.shape())?;
    let rstd = rstd.dense_f32(OP, "rstd")?;
    let devices = [
        x.device(),
        weight.values.device(),
        y.device(),
        rstd.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::forward(
            device,
            "apply",
            x,
            y,
            Statistics {
                weight,
                eps: 0.0,
                rstd,
            },
        );
    }
    let (weight, rstd) = (&weight.on_host(OP)?, rstd.contiguous(OP, "rstd")?);
    with_dtype!(x.dtype(), X => with_dtype!(y.dtype(), Y =>
        cpu::apply::<X, Y>(typed(x), weight, rstd, typed_mut(y))
    ));
    Ok(())
}

/// Adds the gradient of the input to `dx [T, D]` and that of the weight to `d_weight [1, D]`.
///
/// `dy` and `x` are `[T, D]`, `rstd` is `[T, 1]`. `d_weight` is `None` for a frozen weight.
///
/// # Errors
/// If a shape or length differs.
pub fn backward<'a>(
    dy: View<'_>,
    x: View<'_>,
    weight: impl Into<Weight<'a>>,
    rstd: View<'_>,
    dx: ViewMut<'_>,
    d_weight: Option<ViewMut<'_>>,
) -> Result<()> {
    const OP: &str = "rms_norm::backward";
    check_shape(OP, "dy", x.shape(), dy.shape())?;
    check_shape(OP, "dx", x.shape(), dx.shape())?;
    let weight = weight.into().checked(OP, x.cols())?;
    check_shape(OP, "rstd", [x.rows(), 1], rstd.shape())?;
    if let Some(d_weight) = &d_weight {
        check_shape(OP, "d_weight", [1, x.cols()], d_weight.shape())?;
    }
    let rstd = rstd.dense_f32(OP, "rstd")?;
    let d_weight = d_weight.map(|d| d.dense_f32(OP, "d_weight")).transpose()?;
    let mut devices = vec![
        dy.device(),
        x.device(),
        weight.values.device(),
        rstd.device(),
        dx.device(),
    ];
    devices.extend(d_weight.as_ref().map(ViewMut::device));
    if let Some(device) = common(OP, &devices)? {
        return cuda::backward(device, dy, x, weight, rstd, dx, d_weight);
    }
    let (weight, rstd) = (&weight.on_host(OP)?, rstd.contiguous(OP, "rstd")?);
    let d_weight = d_weight.map(|d| d.contiguous(OP, "d_weight")).transpose()?;
    with_dtype!(dy.dtype(), G => with_dtype!(x.dtype(), X => with_dtype!(dx.dtype(), D =>
        cpu::backward::<G, X, D>(typed(dy), typed(x), weight, rstd, typed_mut(dx), d_weight)
    )));
    Ok(())
}
