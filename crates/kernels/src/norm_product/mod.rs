//! One over the product of the norms of two factors, rank by rank.
//!
//! ```text
//! out[k] = 1 / (max(|a[k,:]|, least) * max(|b[:,k]|, least))                  a [R, n], b [m, R]
//! d_a[k,:] -= d[k] * out[k] / |a[k,:]|^2 * a[k,:]     where |a[k,:]| > least; d_b[:,k] alike
//! ```
//!
//! Everything is f32, norms are f64; sums are in a fixed order.
//!
//! # Source
//! Bini et al.: "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation" (2025).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::{Result, View, ViewMut};

/// Two factors.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a> {
    /// `[R, n]`, f32.
    pub a: View<'a>,
    /// `[m, R]`, f32.
    pub b: View<'a>,
    /// The least norm that is divided by.
    pub least: f32,
}

impl Factors<'_> {
    fn check(self, op: &'static str) -> Result<Self> {
        check_shape(
            op,
            "b [m, R]",
            [self.b.rows(), self.a.rows()],
            self.b.shape(),
        )?;
        let (a, b) = (self.a.dense_f32(op, "a")?, self.b.dense_f32(op, "b")?);
        Ok(Self { a, b, ..self })
    }
}

/// Writes one over the products to `out [R, 1]`.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn inverse(out: ViewMut<'_>, of: Factors<'_>) -> Result<()> {
    const OP: &str = "norm_product::inverse";
    let of = of.check(OP)?;
    check_shape(OP, "out [R, 1]", [of.a.rows(), 1], out.shape())?;
    let out = out.dense_f32(OP, "out")?;
    if let Some(device) = common(OP, &[out.device(), of.a.device(), of.b.device()])? {
        return cuda::inverse(device, out, of);
    }
    let (a, b) = (of.a.contiguous(OP, "a")?, of.b.contiguous(OP, "b")?);
    cpu::inverse(out.contiguous(OP, "out")?, a, b, of.least);
    Ok(())
}

/// Adds to `d_a` and `d_b` the gradients of the factors, from that of [`inverse`], `d [R, 1]`.
///
/// # Errors
/// As [`inverse`].
pub fn add_inverse_gradients(
    [d_a, d_b]: [ViewMut<'_>; 2],
    d: View<'_>,
    of: Factors<'_>,
) -> Result<()> {
    const OP: &str = "norm_product::add_inverse_gradients";
    let of = of.check(OP)?;
    check_shape(OP, "d [R, 1]", [of.a.rows(), 1], d.shape())?;
    check_shape(OP, "d_a", of.a.shape(), d_a.shape())?;
    check_shape(OP, "d_b", of.b.shape(), d_b.shape())?;
    let d = d.dense_f32(OP, "d")?;
    let (d_a, d_b) = (d_a.dense_f32(OP, "d_a")?, d_b.dense_f32(OP, "d_b")?);
    let devices = [
        d_a.device(),
        d_b.device(),
        d.device(),
        of.a.device(),
        of.b.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_inverse_gradients(device, [d_a, d_b], d, of);
    }
    let (a, b) = (of.a.contiguous(OP, "a")?, of.b.contiguous(OP, "b")?);
    let (d_a, d_b) = (d_a.contiguous(OP, "d_a")?, d_b.contiguous(OP, "d_b")?);
    cpu::add_inverse_gradients([d_a, d_b], d.contiguous(OP, "d")?, [a, b], of.least);
    Ok(())
}
