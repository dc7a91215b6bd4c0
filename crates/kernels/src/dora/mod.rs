//! DoRA: a weight with its low-rank update, brought to trained row norms.
//!
//! ```text
//! n[i] = |W[i] + scale * B[i] A|        y[t, i] = u[t, i] * m[i] / n[i],   u = x (W + scale * B A)^T
//! dm[i] += sum_t dy[t, i] * u[t, i] / n[i]        du[t, i] = dy[t, i] * m[i] / n[i]
//! ```
//!
//! n is a constant in backward. It is computed without making the sum: with `cross = A W^T` and
//! `spread = (A A^T) B^T`, both `[R, out]`,
//! `n[i]^2 = |W[i]|^2 + sum_r B[i, r] * (2 scale * cross[r, i] + scale^2 * spread[r, i])`.
//!
//! # Source
//! Liu et al.: "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), section 4.3 for the constant;
//! PEFT's `DoraLinearLayer`.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::{check_dtype, check_shape};
use crate::tensor::with_dtype;
use crate::{Result, View, ViewMut};

/// What the norms are made of.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// W `[out, in]`, f32 or bf16; or, where they are known, the norms of its rows `[out, 1]`.
    pub weight: View<'a>,
    /// B `[out, R]`, f32.
    pub b: View<'a>,
    /// `A W^T` `[R, out]`, f32.
    pub cross: View<'a>,
    /// `(A A^T) B^T` `[R, out]`, f32.
    pub spread: View<'a>,
    /// Factor of the update.
    pub scale: f32,
}

/// Writes n to `norms [1, out]`, f32.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn row_norms(of: &Operands<'_>, norms: ViewMut<'_>) -> Result<()> {
    const OP: &str = "dora::row_norms";
    let [out, rank] = of.b.shape();
    check_shape(OP, "norms", [1, out], norms.shape())?;
    check_shape(OP, "W", [out, of.weight.cols()], of.weight.shape())?;
    check_shape(OP, "A W^T", [rank, out], of.cross.shape())?;
    check_shape(OP, "(A A^T) B^T", [rank, out], of.spread.shape())?;
    let (b, cross) = (of.b.dense_f32(OP, "B")?, of.cross.dense_f32(OP, "A W^T")?);
    let spread = of.spread.dense_f32(OP, "(A A^T) B^T")?;
    let norms = norms.dense_f32(OP, "norms")?;
    let devices = [of.weight, b, cross, spread].map(|view| view.device());
    if let Some(device) = common(OP, &devices)? {
        return cuda::row_norms(device, of, norms);
    }
    let low_rank = cpu::LowRank {
        b: b.contiguous(OP, "B")?,
        cross: cross.contiguous(OP, "A W^T")?,
        spread: spread.contiguous(OP, "(A A^T) B^T")?,
        scale: of.scale,
    };
    let norms = norms.contiguous(OP, "norms")?;
    with_dtype!(of.weight.dtype(), T => {
        if let Some(weight) = of.weight.typed::<T>() {
            cpu::row_norms(weight, &low_rank, norms);
        }
    });
    Ok(())
}

/// Multiplies each row of `y [T, out]`, f32 or bf16, by `magnitude / norms`, both `[1, out]` f32.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn scale(y: ViewMut<'_>, magnitude: View<'_>, norms: View<'_>) -> Result<()> {
    const OP: &str = "dora::scale";
    let [magnitude, norms] = vectors(OP, y.cols(), magnitude, norms)?;
    if let Some(device) = common(OP, &[y.device(), magnitude.device(), norms.device()])? {
        return cuda::scale(device, y, magnitude, norms);
    }
    let magnitude = magnitude.contiguous(OP, "magnitude")?;
    let norms = norms.contiguous(OP, "norms")?;
    with_dtype!(y.dtype(), T => {
        if let Some(y) = y.typed::<T>() {
            cpu::scale(y, magnitude, norms);
        }
    });
    Ok(())
}

/// [`scale`] of `y`, which is first copied to `u`, of its shape and dtype, for [`backward`].
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn forward(
    y: ViewMut<'_>,
    mut u: ViewMut<'_>,
    magnitude: View<'_>,
    norms: View<'_>,
) -> Result<()> {
    const OP: &str = "dora::forward";
    check_shape(OP, "u", y.shape(), u.shape())?;
    check_dtype(OP, "u", y.dtype(), u.dtype())?;
    let [magnitude, norms] = vectors(OP, y.cols(), magnitude, norms)?;
    let devices = [y.device(), u.device(), magnitude.device(), norms.device()];
    if let Some(device) = common(OP, &devices)? {
        u.reborrow().copy_from(y.as_view());
        return cuda::scale(device, y, magnitude, norms);
    }
    let magnitude = magnitude.contiguous(OP, "magnitude")?;
    let norms = norms.contiguous(OP, "norms")?;
    with_dtype!(y.dtype(), T => {
        if let (Some(y), Some(u)) = (y.typed::<T>(), u.typed::<T>()) {
            cpu::forward(y, u, magnitude, norms);
        }
    });
    Ok(())
}

/// Adds to `d_magnitude [1, out]` f32 the column sums of `dy * u / norms`, and writes
/// `du = dy * magnitude / norms` `[T, out]`, of the dtype of `dy`.
///
/// `dy` and `u`, the output before [`scale`], are `[T, out]`, f32 or bf16. Rows are summed in order.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn backward(
    dy: View<'_>,
    u: View<'_>,
    magnitude: View<'_>,
    norms: View<'_>,
    d_magnitude: ViewMut<'_>,
    mut du: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "dora::backward";
    check_shape(OP, "u", dy.shape(), u.shape())?;
    check_shape(OP, "du", dy.shape(), du.shape())?;
    check_dtype(OP, "du", dy.dtype(), du.dtype())?;
    check_shape(OP, "d_magnitude", [1, dy.cols()], d_magnitude.shape())?;
    let [magnitude, norms] = vectors(OP, dy.cols(), magnitude, norms)?;
    let d_magnitude = d_magnitude.dense_f32(OP, "d_magnitude")?;
    let devices = [
        dy.device(),
        u.device(),
        magnitude.device(),
        norms.device(),
        du.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        cuda::backward(device, dy, u, norms, d_magnitude)?;
        du.reborrow().copy_from(dy);
        return cuda::scale(device, du, magnitude, norms);
    }
    let of = cpu::Scaling {
        magnitude: magnitude.contiguous(OP, "magnitude")?,
        norms: norms.contiguous(OP, "norms")?,
    };
    let d_magnitude = d_magnitude.contiguous(OP, "d_magnitude")?;
    with_dtype!(dy.dtype(), T => {
        with_dtype!(u.dtype(), U => {
            let matrices = (dy.typed::<T>(), u.typed::<U>(), du.reborrow().typed::<T>());
            if let (Some(dy), Some(u), Some(du)) = matrices {
                cpu::backward(dy, u, &of, d_magnitude, du);
            }
        });
    });
    Ok(())
}

/// `magnitude` and `norms`, if they are `[1, cols]` f32.
fn vectors<'a>(
    op: &'static str,
    cols: usize,
    magnitude: View<'a>,
    norms: View<'a>,
) -> Result<[View<'a>; 2]> {
    let vector = |what, view: View<'a>| {
        check_shape(op, what, [1, cols], view.shape())?;
        view.dense_f32(op, what)
    };
    Ok([vector("magnitude", magnitude)?, vector("norms", norms)?])
}
