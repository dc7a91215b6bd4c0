//! Products element by element, and their sums.
//!
//! ```text
//! out[r,c] = beta * out[r,c] + alpha * a[r,c] * b[r,c]        out[r,c] *= offset + b[r,c]
//! rows[r] += alpha * sum_c a[r,c] * b[r,c]                    columns[c] += alpha * sum_r a[r,c] * b[r,c]
//! ```
//!
//! An operand of one row stands for that row in every row, one of one column for that column in every
//! column. Operands are f32 or bf16, each its own; arithmetic is f32. With `beta` 0 what `out` holds is
//! not read. Sums are in a fixed order.
//!
//! # Source
//! Hadamard's product, with NumPy's broadcasting.

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
use crate::{Error, Result, View, ViewMut};
use cpu::Operand;

/// `out = beta out + alpha a ∘ b`.
///
/// # Errors
/// If an operand has neither the shape of `out` nor one row or column of it.
pub fn add(out: ViewMut<'_>, beta: f32, alpha: f32, a: View<'_>, b: View<'_>) -> Result<()> {
    const OP: &str = "hadamard::add";
    let shape = out.shape();
    check_operand(OP, "a", shape, a)?;
    check_operand(OP, "b", shape, b)?;
    if let Some(device) = common(OP, &[out.device(), a.device(), b.device()])? {
        return cuda::add(device, out, [beta, alpha], a, b);
    }
    with_dtype!(out.dtype(), O => with_dtype!(a.dtype(), A => with_dtype!(b.dtype(), B => {
        let (a, b) = (Operand::<A>::of(typed(a)), Operand::<B>::of(typed(b)));
        cpu::add::<O, A, B>(typed_mut(out), [beta, alpha], &a, &b);
    })));
    Ok(())
}

/// `out = out ∘ (offset + b)`.
///
/// # Errors
/// If `b` has neither the shape of `out` nor one row or column of it.
pub fn scale(out: ViewMut<'_>, offset: f32, b: View<'_>) -> Result<()> {
    const OP: &str = "hadamard::scale";
    check_operand(OP, "b", out.shape(), b)?;
    if let Some(device) = common(OP, &[out.device(), b.device()])? {
        return cuda::scale(device, out, offset, b);
    }
    with_dtype!(out.dtype(), O => with_dtype!(b.dtype(), B => {
        cpu::scale::<O, B>(typed_mut(out), offset, &Operand::<B>::of(typed(b)));
    }));
    Ok(())
}

/// Adds to `sums [rows, 1]`, f32, the sums of the rows of `alpha a ∘ b`. One of the operands has the full shape.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn add_row_sums(sums: ViewMut<'_>, alpha: f32, a: View<'_>, b: View<'_>) -> Result<()> {
    const OP: &str = "hadamard::add_row_sums";
    let shape = summed(OP, a, b)?;
    check_shape(OP, "sums", [shape[0], 1], sums.shape())?;
    let sums = sums.dense_f32(OP, "sums")?;
    if let Some(device) = common(OP, &[sums.device(), a.device(), b.device()])? {
        return cuda::add_row_sums(device, sums, alpha, shape, [a, b]);
    }
    let sums = sums.contiguous(OP, "sums")?;
    with_dtype!(a.dtype(), A => with_dtype!(b.dtype(), B => {
        let (a, b) = (Operand::<A>::of(typed(a)), Operand::<B>::of(typed(b)));
        cpu::add_row_sums(sums, alpha, shape[1], &a, &b);
    }));
    Ok(())
}

/// Adds to `sums [1, cols]`, f32, the sums of the columns of `alpha a ∘ b`. One of the operands has the full shape.
///
/// # Errors
/// If a shape or dtype does not fit.
pub fn add_column_sums(sums: ViewMut<'_>, alpha: f32, a: View<'_>, b: View<'_>) -> Result<()> {
    const OP: &str = "hadamard::add_column_sums";
    let shape = summed(OP, a, b)?;
    check_shape(OP, "sums", [1, shape[1]], sums.shape())?;
    let sums = sums.dense_f32(OP, "sums")?;
    if let Some(device) = common(OP, &[sums.device(), a.device(), b.device()])? {
        return cuda::add_column_sums(device, sums, alpha, shape, [a, b]);
    }
    let sums = sums.contiguous(OP, "sums")?;
    with_dtype!(a.dtype(), A => with_dtype!(b.dtype(), B => {
        let (a, b) = (Operand::<A>::of(typed(a)), Operand::<B>::of(typed(b)));
        cpu::add_column_sums(sums, alpha, shape[0], &a, &b);
    }));
    Ok(())
}

/// The shape of `a ∘ b`.
fn summed(op: &'static str, a: View<'_>, b: View<'_>) -> Result<[usize; 2]> {
    let shape = [a.rows().max(b.rows()), a.cols().max(b.cols())];
    check_operand(op, "a", shape, a)?;
    check_operand(op, "b", shape, b)?;
    Ok(shape)
}

fn check_operand(
    op: &'static str,
    what: &'static str,
    shape: [usize; 2],
    operand: View<'_>,
) -> Result<()> {
    let fits = |of: usize, has: usize| has == of || has == 1;
    if fits(shape[0], operand.rows()) && fits(shape[1], operand.cols()) {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        what,
        expected: shape,
        got: operand.shape(),
    })
}
