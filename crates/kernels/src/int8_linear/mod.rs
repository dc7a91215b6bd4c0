//! The product of `LLM.int8()`: a linear whose weight is bytes, and whose input becomes bytes for it.
//!
//! ```text
//! o      columns c in which |f16(x[t,c])| >= threshold for some t; none with a threshold of 0
//! s[t]   = max |f16(x[t,c])| over the elements of row t below the threshold
//! q[t,c] = round(f16(x[t,c]) * (127 / s[t])), 0 in the columns o
//! y[t,r] = (sum_c q[t,c] Q[r,c]) * (s[t] S[r]) / 127^2 + sum_{c in o} x[t,c] W[r,c]
//! ```
//!
//! x and y are f32 or bf16, Q and S the bytes and scales of the weight, W what they stand for. Rows beyond
//! the last document are padding, and say nothing of o; which columns those are depends on all other rows of
//! the micro-batch, as in bitsandbytes.
//!
//! Bytes are multiplied as f32 or bf16 numbers, which hold them exactly, and summed in f32, where every sum
//! below 2^24 is exact too: the products are those of 32-bit integers. A sum reaches 2^24 if a thousand
//! products of the largest bytes have one sign; then it is rounded to f32, as its integer would be next.
//!
//! # Source
//! Dettmers et al.: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (2022);
//! `MatMul8bitLt` of bitsandbytes 0.50, whose backward is one of the values: `dx = dy W`.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::dequantise::Int8;
use crate::device::common;
use crate::error::check_shape;
use crate::row_blocks::typed;
use crate::tensor::with_dtype;
use crate::{DType, Device, Indices, Result, Tensor, View, ViewMut, Workspace, matmul};

/// 1 / 127^2 as bitsandbytes writes it.
const INVERSE_127_SQUARED: f32 = 6.200_124e-5;
/// f32 sums that are held at once where the output is bf16.
const SUMS: usize = 1 << 22;

/// The input of linears as bytes.
#[derive(Debug)]
pub struct Input {
    /// `[T, in]`, whole numbers from -127 to 127.
    codes: Tensor,
    /// `[T, 1]` f32: s.
    scales: Tensor,
    outliers: Outliers,
}

/// The columns o, in order.
#[derive(Debug)]
enum Outliers {
    Host(Vec<u32>),
    /// `2 * in + 1` words: a flag per column, how many there are, and which.
    Cuda(Tensor),
}

/// Words that the columns o take on a GPU.
fn outlier_words(columns: usize) -> usize {
    2 * columns + 1
}

/// Bytes of the scratch that an input of at most `columns` columns and products with it take of a workspace,
/// beside `[T, in]` of the dtype of the codes and `[T, 1]` of f32.
#[must_use]
pub fn scratch_bytes(on_gpu: bool, activations: DType, columns: usize) -> usize {
    let outliers = if on_gpu { outlier_words(columns) } else { 0 };
    let sums = if activations == DType::F32 { 0 } else { SUMS };
    (outliers + sums) * size_of::<f32>()
}

impl Input {
    /// Quantises `x [T, in]` to bytes that are stored as `dtype`, that of the weight's.
    ///
    /// Columns with a value of at least `threshold`, if that is not 0, are left out: products read them from
    /// `x`. `documents` are the bounds of the documents; rows from the last on are padding. `columns` is the
    /// most that any input of the model has, so that scratch memory is of one size.
    ///
    /// # Errors
    /// If `x` and `documents` are on different devices; the first failure of the GPU.
    pub fn new(
        x: View<'_>,
        dtype: DType,
        threshold: f32,
        documents: &Indices<'_>,
        columns: usize,
        workspace: &Workspace,
    ) -> Result<Self> {
        const OP: &str = "int8_linear::Input::new";
        let [rows, cols] = x.shape();
        let pool = match workspace.device() {
            Device::Cpu => None,
            Device::Cuda(device) => Some(device),
        };
        let device = common(OP, &[x.device(), pool])?;
        let mut codes = workspace.take(dtype, rows, cols);
        let mut scales = workspace.take(DType::F32, rows, 1);
        let outliers = if let Some(device) = device {
            let words = outlier_words(columns.max(cols));
            let buffer = workspace.take_scratch(DType::F32, words);
            let mut outliers = Tensor::from_buffer(buffer, 1, words);
            let to = cuda::Quantised {
                codes: codes.view_mut(),
                scales: scales.view_mut(),
                outliers: outliers.view_mut(),
            };
            cuda::quantise(device, x, threshold, documents, to)?;
            Outliers::Cuda(outliers)
        } else {
            let used = documents.last().map_or(rows, |&end| end as usize).min(rows);
            Outliers::Host(
                with_dtype!(x.dtype(), X => with_dtype!(dtype, C => cpu::quantise::<X, C>(
                    typed(x), threshold, used, codes.view_mut(), scales.view_mut(),
                ))),
            )
        };
        Ok(Self {
            codes,
            scales,
            outliers,
        })
    }

    /// Bytes as numbers `[T, in]`, the largest magnitude that each row's 127 stands for `[T, 1]`, and the columns that
    /// stay floating point, if the host holds them.
    #[must_use]
    pub fn parts(&self) -> Option<(View<'_>, View<'_>, &[u32])> {
        match &self.outliers {
            Outliers::Host(columns) => Some((self.codes.view(), self.scales.view(), columns)),
            Outliers::Cuda(_) => None,
        }
    }

    /// Writes `y [T, out]`, the product of this input, which was made of `x`, with `weight`.
    ///
    /// `room` is memory for the bytes of the weight as numbers, in the dtype of the codes.
    ///
    /// # Errors
    /// If the shapes do not fit together; the first failure of the GPU.
    pub fn product(
        &self,
        x: View<'_>,
        weight: &Int8,
        mut room: ViewMut<'_>,
        mut y: ViewMut<'_>,
        workspace: &Workspace,
    ) -> Result<()> {
        const OP: &str = "int8_linear::Input::product";
        let [rows, cols] = self.codes.view().shape();
        let out = weight.shape()[0];
        check_shape(OP, "weight", [out, cols], weight.shape())?;
        check_shape(OP, "x", [rows, cols], x.shape())?;
        check_shape(OP, "y", [rows, out], y.shape())?;
        let codes = self.codes.view();
        common(
            OP,
            &[codes.device(), x.device(), weight.device(), y.device()],
        )?;
        weight.write_codes(room.reborrow())?;
        let bytes = room.as_view();
        if y.dtype() == DType::F32 {
            matmul::nt(y.reborrow(), 0.0, 1.0, codes, bytes)?;
            return self.finish(0, x, weight, None, y);
        }
        let buffer = workspace.take_scratch(DType::F32, SUMS.max(out));
        let each = (SUMS / out.max(1)).max(1);
        let mut sums = Tensor::from_buffer(buffer, each, out);
        for first in (0..rows).step_by(each) {
            let part = first..rows.min(first + each);
            let mut sums = sums.view_mut().row_range(0..part.len());
            let codes = codes.row_range(part.clone());
            matmul::nt(sums.reborrow(), 0.0, 1.0, codes, bytes)?;
            let (x, y) = (x.row_range(part.clone()), y.reborrow().row_range(part));
            self.finish(first, x, weight, Some(sums.as_view()), y)?;
        }
        workspace.give_scratch(sums.into_buffer());
        Ok(())
    }

    /// Scales the sums of rows from `first` on, those in `y` where there are no others, and adds the columns o.
    fn finish(
        &self,
        first: usize,
        x: View<'_>,
        weight: &Int8,
        sums: Option<View<'_>>,
        y: ViewMut<'_>,
    ) -> Result<()> {
        let scales = self.scales.view().row_range(first..first + x.rows());
        match &self.outliers {
            Outliers::Cuda(outliers) => cuda::finish(x, weight, scales, outliers.view(), sums, y),
            Outliers::Host(outliers) => {
                with_dtype!(x.dtype(), X => with_dtype!(y.dtype(), Y => cpu::finish::<X, Y>(
                    typed(x), weight, scales, outliers, sums, y,
                )));
                Ok(())
            }
        }
    }

    /// Gives its buffers back.
    pub fn give(self, workspace: &Workspace) {
        workspace.give(self.codes);
        workspace.give(self.scales);
        if let Outliers::Cuda(outliers) = self.outliers {
            workspace.give_scratch(outliers.into_buffer());
        }
    }
}
