//! The product of every row of one matrix with every row of another, element by element.
//!
//! ```text
//! out[j, k*B + b] = scale[k*B + b] * a[k,j] * g[b,j]           a [A, n], g [B, n], out [n, A*B]
//! d_scale[k*B + b] += alpha * sum_j d[j, k*B + b] * a[k,j] * g[b,j]
//! d_g[b,j] += alpha * sum_k d[j, k*B + b] * scale[k*B + b] * a[k,j]
//! ```
//!
//! Everything is f32; sums are in a fixed order.
//!
//! # Source
//! Khatri and Rao: "Solutions to some functional equations and their applications to characterization of
//! probability distributions" (1968), transposed.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::{check_dtype, check_shape};
use crate::row_blocks::{typed, typed_mut};
use crate::{DType, Result, View, ViewMut};

/// What is multiplied.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// `[A, n]` f32, of any pitch.
    pub a: View<'a>,
    /// `[B, n]` f32, of any pitch.
    pub g: View<'a>,
    /// `[1, A * B]` f32.
    pub scale: View<'a>,
}

impl Operands<'_> {
    /// A, B and n.
    fn shape(&self) -> [usize; 3] {
        [self.a.rows(), self.g.rows(), self.a.cols()]
    }

    fn check(&self, op: &'static str, product: View<'_>) -> Result<()> {
        let [a, b, n] = self.shape();
        for (what, view) in [("a", self.a), ("g", self.g), ("the product", product)] {
            check_dtype(op, what, DType::F32, view.dtype())?;
        }
        check_shape(op, "g [B, n]", [b, n], self.g.shape())?;
        check_shape(op, "scale [1, A * B]", [1, a * b], self.scale.shape())?;
        self.scale.dense_f32(op, "scale")?;
        check_shape(op, "the product [n, A * B]", [n, a * b], product.shape())
    }
}

/// Writes the product to `out`.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn product(out: ViewMut<'_>, of: Operands<'_>) -> Result<()> {
    const OP: &str = "khatri_rao::product";
    of.check(OP, out.as_view())?;
    let devices = [
        out.device(),
        of.a.device(),
        of.g.device(),
        of.scale.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::product(device, out, of);
    }
    cpu::product(
        typed_mut(out),
        typed(of.a),
        typed(of.g),
        of.scale.contiguous(OP, "scale")?,
    );
    Ok(())
}

/// Adds to `d_scale` the gradient of the scale, from that of the product, `d`.
///
/// # Errors
/// As [`product`].
pub fn add_scale_gradient(
    d_scale: ViewMut<'_>,
    alpha: f32,
    d: View<'_>,
    of: Operands<'_>,
) -> Result<()> {
    const OP: &str = "khatri_rao::add_scale_gradient";
    of.check(OP, d)?;
    check_shape(OP, "d_scale", of.scale.shape(), d_scale.shape())?;
    let d_scale = d_scale.dense_f32(OP, "d_scale")?;
    let devices = [d_scale.device(), d.device(), of.a.device(), of.g.device()];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_scale_gradient(device, d_scale, alpha, d, of);
    }
    let d_scale = d_scale.contiguous(OP, "d_scale")?;
    cpu::add_scale_gradient(d_scale, alpha, typed(d), typed(of.a), typed(of.g));
    Ok(())
}

/// Adds to `d_g` the gradient of g, from that of the product, `d`.
///
/// # Errors
/// As [`product`].
pub fn add_second_gradient(
    d_g: ViewMut<'_>,
    alpha: f32,
    d: View<'_>,
    of: Operands<'_>,
) -> Result<()> {
    const OP: &str = "khatri_rao::add_second_gradient";
    of.check(OP, d)?;
    check_shape(OP, "d_g", of.g.shape(), d_g.shape())?;
    check_dtype(OP, "d_g", DType::F32, d_g.dtype())?;
    let devices = [d_g.device(), d.device(), of.a.device(), of.scale.device()];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_second_gradient(device, d_g, alpha, d, of);
    }
    let scale = of.scale.contiguous(OP, "scale")?;
    cpu::add_second_gradient(typed_mut(d_g), alpha, typed(d), typed(of.a), scale);
    Ok(())
}
