//! Matrices put together from vectors of a bank.
//!
//! Every piece p of the matrix is a mean of the `topk` vectors with the largest logits, of equal ones those that come
//! first, weighted by their softmax:
//!
//! ```text
//! piece[p] = sum over the chosen v of w[p,v] * bank[v]           w[p,:] = softmax of the chosen logits[p,:]
//! d_logits[p,v] += w[p,v] * (d[p] . bank[v] - sum over the chosen u of w[p,u] * d[p] . bank[u])
//! d_bank[v] += sum over p that chose v of w[p,v] * d[p]
//! ```
//!
//! Pieces lie along rows, or down columns, in a grid `[A, B]`, numbered row by row. Everything is f32; sums are in a
//! fixed order.
//!
//! # Source
//! Li et al.: "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks" (2024).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::{check_dtype, check_shape};
use crate::row_blocks::{typed, typed_mut};
use crate::{DType, Error, Result, View, ViewMut};

/// How pieces of the bank's length L lie in the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// The matrix is `[A, B * L]`.
    Rows,
    /// The matrix is `[A * L, B]`.
    Columns,
}

/// What a matrix is put together from.
#[derive(Clone, Copy, Debug)]
pub struct Composition<'a> {
    /// `[A * B, vectors]`, f32.
    pub logits: View<'a>,
    /// `[vectors, L]`, f32.
    pub bank: View<'a>,
    /// Vectors of a piece, at least 1.
    pub topk: usize,
    /// How pieces lie.
    pub along: Along,
}

impl Composition<'_> {
    fn check(self, op: &'static str, matrix: View<'_>) -> Result<Self> {
        let ([vectors, length], [rows, cols]) = (self.bank.shape(), matrix.shape());
        if self.topk == 0 || self.topk > vectors {
            let message = format!("{} of {vectors} vectors cannot be chosen", self.topk);
            return Err(Error::Invalid { op, message });
        }
        let side = match self.along {
            Along::Rows => cols,
            Along::Columns => rows,
        };
        if length == 0 || !side.is_multiple_of(length) {
            let message = format!("vectors of {length} do not divide a matrix of {rows} x {cols}");
            return Err(Error::Invalid { op, message });
        }
        let pieces = rows * cols / length;
        check_shape(op, "logits", [pieces, vectors], self.logits.shape())?;
        check_dtype(op, "the matrix", DType::F32, matrix.dtype())?;
        Ok(Self {
            logits: self.logits.dense_f32(op, "logits")?,
            bank: self.bank.dense_f32(op, "bank")?,
            ..self
        })
    }

    /// B, of a matrix with `cols` columns.
    fn pieces_across(self, cols: usize) -> usize {
        match self.along {
            Along::Rows => cols / self.bank.cols(),
            Along::Columns => cols,
        }
    }
}

/// Writes the matrix to `out`.
///
/// # Errors
/// If a shape or dtype does not fit, or `topk` is none of the vectors.
pub fn compose(out: ViewMut<'_>, of: Composition<'_>) -> Result<()> {
    const OP: &str = "vector_bank::compose";
    let of = of.check(OP, out.as_view())?;
    if let Some(device) = common(OP, &[out.device(), of.logits.device(), of.bank.device()])? {
        return cuda::compose(device, out, of);
    }
    let chosen = cpu::Chosen::of(of.logits.contiguous(OP, "logits")?, of.bank.rows(), of.topk);
    let bank = of.bank.contiguous(OP, "bank")?;
    let layout = cpu::Layout::new(of, out.cols());
    cpu::compose(typed_mut(out), &chosen, bank, layout);
    Ok(())
}

/// Adds to `d_logits` their gradient, from that of the matrix, `d`.
///
/// # Errors
/// As [`compose`].
pub fn add_logits_gradient(d_logits: ViewMut<'_>, d: View<'_>, of: Composition<'_>) -> Result<()> {
    const OP: &str = "vector_bank::add_logits_gradient";
    let of = of.check(OP, d)?;
    check_shape(OP, "d_logits", of.logits.shape(), d_logits.shape())?;
    let d_logits = d_logits.dense_f32(OP, "d_logits")?;
    let devices = [
        d_logits.device(),
        d.device(),
        of.logits.device(),
        of.bank.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_logits_gradient(device, d_logits, d, of);
    }
    let chosen = cpu::Chosen::of(of.logits.contiguous(OP, "logits")?, of.bank.rows(), of.topk);
    let bank = of.bank.contiguous(OP, "bank")?;
    let layout = cpu::Layout::new(of, d.cols());
    let d_logits = d_logits.contiguous(OP, "d_logits")?;
    cpu::add_logits_gradient(d_logits, typed(d), &chosen, bank, layout);
    Ok(())
}

/// Adds to `d_bank` its gradient, from that of the matrix, `d`.
///
/// # Errors
/// As [`compose`].
pub fn add_bank_gradient(d_bank: ViewMut<'_>, d: View<'_>, of: Composition<'_>) -> Result<()> {
    const OP: &str = "vector_bank::add_bank_gradient";
    let of = of.check(OP, d)?;
    check_shape(OP, "d_bank", of.bank.shape(), d_bank.shape())?;
    let d_bank = d_bank.dense_f32(OP, "d_bank")?;
    let devices = [d_bank.device(), d.device(), of.logits.device()];
    if let Some(device) = common(OP, &devices)? {
        return cuda::add_bank_gradient(device, d_bank, d, of);
    }
    let chosen = cpu::Chosen::of(of.logits.contiguous(OP, "logits")?, of.bank.rows(), of.topk);
    let layout = cpu::Layout::new(of, d.cols());
    let d_bank = d_bank.contiguous(OP, "d_bank")?;
    cpu::add_bank_gradient(d_bank, typed(d), &chosen, layout);
    Ok(())
}
