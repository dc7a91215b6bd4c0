//! The Kronecker product of two matrices, added to a third.
//!
//! ```text
//! out[r,c] += alpha * a[r / p, c / q] * b[r % p, c % q]              b [p, q]
//! da[i,j] += alpha * sum d[i*p + x, j*q + y] * b[x,y]                over x, y
//! db[x,y] += alpha * sum d[i*p + x, j*q + y] * a[i,j]                over i, j
//! ```
//!
//! The last blocks may stick out of `out`. Everything is f32; sums are in a fixed order.
//!
//! # Source
//! Van Loan: "The ubiquitous Kronecker product" (2000).

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

/// The second factor, as it is stored.
#[derive(Clone, Copy, Debug)]
pub struct Second<'a> {
    /// b `[p, q]`, rows back to back.
    pub matrix: View<'a>,
    /// Whether it is stored as `[q, p]`.
    pub transposed: bool,
}

impl Second<'_> {
    /// p and q.
    fn shape(&self) -> [usize; 2] {
        oriented(self.matrix.shape(), self.transposed)
    }
}

fn oriented([rows, cols]: [usize; 2], transposed: bool) -> [usize; 2] {
    if transposed {
        [cols, rows]
    } else {
        [rows, cols]
    }
}

/// `out += alpha a ⊗ b`.
///
/// # Errors
/// If `a` has another number of blocks than `out`, or a dtype is not f32.
pub fn add(out: ViewMut<'_>, alpha: f32, a: View<'_>, b: Second<'_>) -> Result<()> {
    const OP: &str = "kronecker::add";
    check_dtype(OP, "out", DType::F32, out.dtype())?;
    let shape = out.shape();
    let (a, b_matrix) = check(OP, shape, a, b.matrix, b.shape())?;
    if let Some(device) = common(OP, &[out.device(), a.device(), b_matrix.device()])? {
        return cuda::add(device, out, alpha, a, b);
    }
    let blocks = cpu::Blocks::new(shape, b.shape(), b.transposed);
    let (a, b) = (a.contiguous(OP, "a")?, b_matrix.contiguous(OP, "b")?);
    cpu::add(typed_mut(out), alpha, a, b, &blocks);
    Ok(())
}

/// Adds to `d_a` the gradient of a, from that of the product `d`.
///
/// # Errors
/// As [`add`].
pub fn add_first_gradient(d_a: ViewMut<'_>, alpha: f32, d: View<'_>, b: Second<'_>) -> Result<()> {
    const OP: &str = "kronecker::add_first_gradient";
    check_dtype(OP, "d", DType::F32, d.dtype())?;
    check(OP, d.shape(), d_a.as_view(), b.matrix, b.shape())?;
    if let Some(device) = common(OP, &[d_a.device(), d.device(), b.matrix.device()])? {
        return cuda::add_first_gradient(device, d_a, alpha, d, b);
    }
    let blocks = cpu::Blocks::new(d.shape(), b.shape(), b.transposed);
    let b = b.matrix.contiguous(OP, "b")?;
    let d_a = d_a.dense_f32(OP, "d_a")?.contiguous(OP, "d_a")?;
    cpu::add_first_gradient(d_a, alpha, typed(d), b, &blocks);
    Ok(())
}

/// Adds to `d_b`, stored as b is, the gradient of b, from that of the product `d`.
///
/// # Errors
/// As [`add`].
pub fn add_second_gradient(
    d_b: ViewMut<'_>,
    transposed: bool,
    alpha: f32,
    d: View<'_>,
    a: View<'_>,
) -> Result<()> {
    const OP: &str = "kronecker::add_second_gradient";
    check_dtype(OP, "d", DType::F32, d.dtype())?;
    let shape = oriented(d_b.shape(), transposed);
    let (a, _) = check(OP, d.shape(), a, d_b.as_view(), shape)?;
    if let Some(device) = common(OP, &[d_b.device(), d.device(), a.device()])? {
        return cuda::add_second_gradient(device, d_b, transposed, alpha, d, a);
    }
    let blocks = cpu::Blocks::new(d.shape(), shape, transposed);
    let a = a.contiguous(OP, "a")?;
    let d_b = d_b.dense_f32(OP, "d_b")?.contiguous(OP, "d_b")?;
    cpu::add_second_gradient(d_b, alpha, typed(d), a, &blocks);
    Ok(())
}

/// Both factors, if they are dense and a has one element for each block of `shape`.
fn check<'a, 'b>(
    op: &'static str,
    [rows, cols]: [usize; 2],
    a: View<'a>,
    b: View<'b>,
    [p, q]: [usize; 2],
) -> Result<(View<'a>, View<'b>)> {
    let blocks = [rows.div_ceil(p.max(1)), cols.div_ceil(q.max(1))];
    check_shape(op, "a", blocks, a.shape())?;
    Ok((a.dense_f32(op, "a")?, b.dense_f32(op, "b")?))
}
