//! Weights that are not trained, in the form they are held in.

use super::room::Augmented;
use super::run::Run;
use crate::Result;
use ferrotune_kernels::dequantise::Quantised;
use ferrotune_kernels::{DType, Tensor, View, ViewMut, Workspace, int8_linear, matmul};
use std::ops::Range;

/// A frozen matrix `[out, in]`.
#[derive(Debug)]
pub(crate) enum FrozenWeight {
    /// The values that products read.
    Dense(Tensor),
    /// With room for low-rank updates.
    Augmented(Augmented),
    /// Codes, from which the values are made anew for each product.
    Codes(Quantised),
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
    /// Columns of the widest input.
    pub(crate) columns: usize,
}

impl Scratch {
    /// Calls `body` with a matrix of this `shape`, of unspecified contents.
    pub(super) fn lend<R>(
        self,
        workspace: &Workspace,
        [rows, cols]: [usize; 2],
        body: impl FnOnce(&mut Tensor) -> Result<R>,
    ) -> Result<R> {
        let buffer = workspace.take_scratch(self.dtype, self.elements);
        let mut values = Tensor::from_buffer(buffer, rows, cols);
        let result = body(&mut values);
        workspace.give_scratch(values.into_buffer());
        result
    }
}

impl FrozenWeight {
    /// `[out, in]`.
    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(values) => [values.rows(), values.cols()],
            Self::Augmented(values) => values.shape(),
            Self::Codes(codes) => codes.shape(),
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
        match self {
            Self::Dense(values) => return product(values.view()),
            Self::Augmented(weight) => return weight.with_base(scratch, workspace, product),
            Self::Codes(_) | Self::Stacked(_) => {}
        }
        scratch.lend(workspace, self.shape(), |values| {
            self.write(values.view_mut())?;
            product(values.view())
        })
    }

    /// Whether the format has a product of its own, which the values do not give.
    pub(crate) fn has_own_product(&self) -> bool {
        match self {
            Self::Codes(codes) => matches!(codes, Quantised::Int8(_)),
            Self::Stacked(parts) => parts.iter().any(Self::has_own_product),
            Self::Dense(_) | Self::Augmented(_) => false,
        }
    }

    /// Writes `y = x W^T`, by the format's own product where it has one.
    pub(crate) fn product(
        &self,
        run: &Run<'_>,
        scratch: Scratch,
        x: View<'_>,
        y: ViewMut<'_>,
    ) -> Result<()> {
        let mut input = None;
        self.part_product(run, scratch, &mut input, x, y)?;
        if let Some(input) = input {
            input.give(run.workspace);
        }
        Ok(())
    }

    /// [`FrozenWeight::product`], where parts over one input share what that becomes for them.
    fn part_product(
        &self,
        run: &Run<'_>,
        scratch: Scratch,
        input: &mut Option<int8_linear::Input>,
        x: View<'_>,
        mut y: ViewMut<'_>,
    ) -> Result<()> {
        match self {
            Self::Stacked(parts) => {
                let mut first = 0;
                for part in parts {
                    let columns = first..first + part.shape()[0];
                    first = columns.end;
                    part.part_product(run, scratch, input, x, y.reborrow().columns(columns))?;
                }
                Ok(())
            }
            Self::Codes(Quantised::Int8(codes)) => {
                let (threshold, documents) = (codes.threshold(), run.inputs.computed_rows());
                let (dtype, columns, workspace) = (scratch.dtype, scratch.columns, run.workspace);
                let input = match input {
                    Some(input) => input,
                    None => input.insert(int8_linear::Input::new(
                        x, dtype, threshold, documents, columns, workspace,
                    )?),
                };
                scratch.lend(workspace, codes.shape(), |values| {
                    Ok(input.product(x, codes, values.view_mut(), y, workspace)?)
                })
            }
            _ => self.with_values(scratch, run.workspace, |values| {
                Ok(matmul::nt(y, 0.0, 1.0, x, values)?)
            }),
        }
    }

    /// Whether its values are written out for each product.
    pub(crate) fn is_written_out(&self) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::Augmented(weight) => weight.codes().is_some(),
            Self::Codes(_) | Self::Stacked(_) => true,
        }
    }

    /// Bits of a code where `rows` are codes.
    pub(crate) fn code_bits(&self, rows: Range<usize>) -> Option<usize> {
        match self {
            Self::Dense(_) => None,
            Self::Augmented(weight) => weight.codes()?.code_bits(rows),
            Self::Codes(codes) => Some(codes.bits()),
            Self::Stacked(parts) => {
                let mut first = 0;
                let mut own = parts.iter().filter(|part| {
                    let begin = first;
                    first += part.shape()[0];
                    begin <= rows.start && rows.end <= first
                });
                own.next()?.code_bits(0..rows.len())
            }
        }
    }

    /// Replaces the values of `rows`, rounded or quantised as they are held.
    pub(crate) fn replace_rows(&mut self, rows: Range<usize>, values: View<'_>) -> Result<()> {
        match self {
            Self::Dense(held) => held.view_mut().row_range(rows).copy_from(values),
            Self::Augmented(held) => return held.replace_rows(rows, values),
            Self::Codes(codes) => *codes = codes.requantise(values)?,
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
    pub(super) fn write(&self, mut out: ViewMut<'_>) -> Result<()> {
        match self {
            Self::Dense(values) => out.copy_from(values.view()),
            Self::Augmented(weight) => return weight.write(out),
            Self::Codes(codes) => codes.dequantise(out)?,
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
