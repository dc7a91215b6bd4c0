//! Layer normalisation, alone or fused with the residual addition before it.
//!
//! ```text
//! mean[t]  = mean_d(x[t,d]),  rstd[t] = 1 / sqrt(mean_d((x[t,d] - mean[t])^2) + eps)
//! n[t,d]   = (x[t,d] - mean[t]) * rstd[t]
//! y[t,d]   = n[t,d] * weight[d] + bias[d]
//! dx[t,d] += rstd[t] * (g[t,d] - mean_d(g[t,d]) - n[t,d] * mean_d(g[t,d] n[t,d])),  g = dy * weight
//! d_weight[d] += sum_t dy[t,d] * n[t,d],  d_bias[d] += sum_t dy[t,d]
//! ```
//!
//! T is the number of rows (packed tokens), D the number of columns (hidden size). Data is f32 or
//! bf16, each argument its own; weight and bias `[1, D]`, the statistics `[T, 2]` (mean and rstd of
//! each row) and arithmetic are f32, rounded once at the end.
//!
//! # Source
//! Ba, Kiros, Hinton: "Layer Normalization" (2016), equation 4.

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
use crate::{Result, View, ViewMut, bias};

/// The parameters of a layer norm.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a> {
    /// `[1, D]` f32.
    pub weight: View<'a>,
    /// `[1, D]` f32.
    pub bias: View<'a>,
    /// Added to the variance.
    pub eps: f32,
}

impl Affine<'_> {
    fn check(&self, op: &'static str, cols: usize) -> Result<()> {
        check_shape(op, "weight", [1, cols], self.weight.shape())?;
        check_shape(op, "bias", [1, cols], self.bias.shape())?;
        self.weight.dense_f32(op, "weight")?;
        self.bias.dense_f32(op, "bias")?;
        Ok(())
    }
}

/// Normalises every row of `x [T, D]` into `y [T, D]`; `statistics [T, 2]` is kept for backward.
///
/// # Errors
/// If a shape differs, or the statistics are not f32 with rows back to back.
pub fn forward(
    x: View<'_>,
    affine: Affine<'_>,
    y: ViewMut<'_>,
    statistics: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "layer_norm::forward";
    check_shape(OP, "y", x.shape(), y.shape())?;
    check_shape(OP, "statistics", [x.rows(), 2], statistics.shape())?;
    affine.check(OP, x.cols())?;
    let statistics = statistics.dense_f32(OP, "statistics")?;
    let (weight, bias) = (affine.weight.device(), affine.bias.device());
    if let Some(device) = common(
        OP,
        &[x.device(), weight, bias, y.device(), statistics.device()],
    )? {
        return cuda::forward(device, "forward", x, affine, y, statistics.as_view());
    }
    let affine = cpu::Affine::of(OP, affine)?;
    let statistics = statistics.contiguous(OP, "statistics")?;
    with_dtype!(x.dtype(), X => with_dtype!(y.dtype(), Y =>
        cpu::forward::<X, Y>(typed(x), affine, typed_mut(y), statistics)
    ));
    Ok(())
}

/// `residual += branch`, then [`forward`] of the residual, in one pass over memory.
///
/// All matrices are `[T, D]`. The statistics are those of the residual as it is stored, rounded to
/// its dtype, so that [`apply`] to it repeats `y`.
///
/// # Errors
/// As [`forward`].
pub fn add_forward(
    residual: ViewMut<'_>,
    branch: View<'_>,
    affine: Affine<'_>,
    y: ViewMut<'_>,
    statistics: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "layer_norm::add_forward";
    check_shape(OP, "branch", residual.shape(), branch.shape())?;
    check_shape(OP, "y", residual.shape(), y.shape())?;
    check_shape(OP, "statistics", [residual.rows(), 2], statistics.shape())?;
    affine.check(OP, residual.cols())?;
    let statistics = statistics.dense_f32(OP, "statistics")?;
    let devices = [
        residual.device(),
        branch.device(),
        affine.weight.device(),
        affine.bias.device(),
        y.device(),
        statistics.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_forward(device, residual, branch, affine, y, statistics);
    }
    let affine = cpu::Affine::of(OP, affine)?;
    let statistics = statistics.contiguous(OP, "statistics")?;
    with_dtype!(residual.dtype(), R => with_dtype!(branch.dtype(), B => with_dtype!(y.dtype(), Y =>
        cpu::add_forward::<R, B, Y>(
            typed_mut(residual), typed(branch), affine, typed_mut(y), statistics,
        )
    )));
    Ok(())
}

/// Recomputes `y [T, D]` from `x [T, D]` and the `statistics [T, 2]` that [`forward`] kept: the same
/// bits.
///
/// # Errors
/// As [`forward`].
pub fn apply(x: View<'_>, affine: Affine<'_>, statistics: View<'_>, y: ViewMut<'_>) -> Result<()> {
    const OP: &str = "layer_norm::apply";
    check_shape(OP, "y", x.shape(), y.shape())?;
    check_shape(OP, "statistics", [x.rows(), 2], statistics.shape())?;
    affine.check(OP, x.cols())?;
    let statistics = statistics.dense_f32(OP, "statistics")?;
    let (weight, bias) = (affine.weight.device(), affine.bias.device());
    if let Some(device) = common(
        OP,
        &[x.device(), weight, bias, y.device(), statistics.device()],
    )? {
        return cuda::forward(device, "apply", x, affine, y, statistics);
    }
    let affine = cpu::Affine::of(OP, affine)?;
    let statistics = statistics.contiguous(OP, "statistics")?;
    with_dtype!(x.dtype(), X => with_dtype!(y.dtype(), Y =>
        cpu::apply::<X, Y>(typed(x), affine, statistics, typed_mut(y))
    ));
    Ok(())
}

/// Where [`backward`] adds the gradients of the parameters, each `[1, D]` f32; `None` for a frozen one.
#[derive(Debug, Default)]
pub struct Gradients<'a> {
    /// Of the weight.
    pub weight: Option<ViewMut<'a>>,
    /// Of the bias.
    pub bias: Option<ViewMut<'a>>,
}

/// Adds the gradient of the input to `dx [T, D]` and those of the parameters to `gradients`.
///
/// `dy` and `x` are `[T, D]`, `weight` is `[1, D]`, `statistics` is `[T, 2]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: View<'_>,
    x: View<'_>,
    weight: View<'_>,
    statistics: View<'_>,
    dx: ViewMut<'_>,
    gradients: Gradients<'_>,
) -> Result<()> {
    const OP: &str = "layer_norm::backward";
    check_shape(OP, "dy", x.shape(), dy.shape())?;
    check_shape(OP, "dx", x.shape(), dx.shape())?;
    check_shape(OP, "weight", [1, x.cols()], weight.shape())?;
    check_shape(OP, "statistics", [x.rows(), 2], statistics.shape())?;
    let weight = weight.dense_f32(OP, "weight")?;
    let statistics = statistics.dense_f32(OP, "statistics")?;
    let (d_weight, d_bias) = (gradients.weight, gradients.bias);
    let mut devices = vec![
        dy.device(),
        x.device(),
        weight.device(),
        statistics.device(),
        dx.device(),
    ];
    if let Some(d_weight) = &d_weight {
        check_shape(OP, "d_weight", [1, x.cols()], d_weight.shape())?;
        d_weight.as_view().dense_f32(OP, "d_weight")?;
        devices.push(d_weight.device());
    }
    if let Some(d_bias) = d_bias {
        bias::backward(dy, d_bias)?;
    }
    if let Some(device) = common(OP, &devices)? {
        return cuda::backward(device, dy, x, weight, statistics, dx, d_weight);
    }
    let weight = weight.contiguous(OP, "weight")?;
    let statistics = statistics.contiguous(OP, "statistics")?;
    let d_weight = d_weight.map(|d| d.contiguous(OP, "d_weight")).transpose()?;
    with_dtype!(dy.dtype(), G => with_dtype!(x.dtype(), X => with_dtype!(dx.dtype(), D =>
        cpu::backward::<G, X, D>(typed(dy), typed(x), weight, statistics, typed_mut(dx), d_weight)
    )));
    Ok(())
}
