//! Weights that are not trained, in the form they are held in.

use crate::Result;
use ferrotune_kernels::dequantise::FourBit;
use ferrotune_kernels::{DType, Tensor, View, ViewMut, Workspace};
use std::ops::Range;

/// A frozen matrix `[out, in]`.
#[derive(Debug)]
pub(crate) enum FrozenWeight {
    /// The values that products read.
    Dense(Tensor),
    /// Codes, from which the values are made anew for each product.
    FourBit(FourBit),
    /// Matrices over one input, one below the other, not all of them dense.
    Stacked(Vec<FrozenWeight>),
}

/// The scratch that values are written to for a product. It is of one size for the whole model, so
/// that one buffer serves all its weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scratch {
    /// Dtype of the values.
    pub(crate) dtype: DType,
    /// Elements of the largest matrix.
    pub(crate) elements: usize,
}

impl FrozenWeight {
    /// `[out, in]`.
    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(values) => [values.rows(), values.cols()],
            Self::FourBit(codes) => codes.shape(),
            Self::Stacked(parts) => {
                let shapes = parts.iter().map(Self::shape);
                shapes.fold([0, 0], |[rows, _], [more, cols]| [rows + more, cols])
            }
        }
    }

    /// Calls `product` with the values: those held, or else those that `workspace` lends room for.
    pub(crate) fn with_values<R>(
        &self,
        scratch: Scratch,
        workspace: &Workspace,
        product: impl FnOnce(View<'_>) -> Result<R>,
    ) -> Result<R> {
        if let Self::Dense(values) = self {
            return product(values.view());
        }
        let [rows, cols] = self.shape();
        let buffer = workspace.take_scratch(scratch.dtype, scratch.elements);
        let mut values = Tensor::from_buffer(buffer, rows, cols);
        self.write(values.view_mut())?;
        let result = product(values.view());
        workspace.give_scratch(values.into_buffer());
        result
    }

    /// The values in host memory, f32.
    pub(crate) fn to_host(&self, scratch: Scratch, workspace: &Workspace) -> Result<Tensor> {
        self.with_values(scratch, workspace, |values| {
            let [rows, cols] = values.shape();
            Ok(Tensor::from_f32(values.to_f32_vec(), rows, cols))
        })
    }

    /// Whether `rows` are codes.
    pub(crate) fn is_quantised(&self, rows: Range<usize>) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::FourBit(_) => true,
            Self::Stacked(parts) => {
                let mut first = 0;
                parts.iter().any(|part| {
                    let begin = first;
                    first += part.shape()[0];
                    begin <= rows.start && rows.end <= first && part.is_quantised(0..rows.len())
                })
            }
        }
    }

    /// Replaces the values of `rows`, rounded or quantised as they are held.
    pub(crate) fn replace_rows(&mut self, rows: Range<usize>, values: View<'_>) -> Result<()> {
        match self {
            Self::Dense(held) => held.view_mut().row_range(rows).copy_from(values),
            Self::FourBit(codes) => *codes = codes.requantise(values)?,
            Self::Stacked(parts) => {
                let mut first = 0;
                for part in parts {
                    let end = first + part.shape()[0];
                    if first <= rows.start && rows.end <= end {
                        return part.replace_rows(rows.start - first..rows.end - first, values);
                    }
                    first = end;
                }
            }
        }
        Ok(())
    }

    /// Writes the values to `out [out, in]`.
    fn write(&self, mut out: ViewMut<'_>) -> Result<()> {
        match self {
            Self::Dense(values) => out.copy_from(values.view()),
            Self::FourBit(codes) => codes.dequantise(out)?,
            Self::Stacked(parts) => {
                let mut first = 0;
                for part in parts {
                    let end = first + part.shape()[0];
                    part.write(out.reborrow().row_range(first..end))?;
                    first = end;
                }
            }
        }
        Ok(())
    }
}
