//! DoRA on a table: the norms of the columns of W + scale * B A, one per feature, over all rows.
//!
//! In closed form, as those of a linear's rows ([`dora::row_norms`], of which this is the transpose):
//! nothing of the table's size is made.
//!
//! # Source
//! PEFT's `DoraEmbeddingLayer`.

use super::run::Run;
use crate::Result;
use crate::adapter::LowRank;
use ferrotune_kernels::{DType, Device, Tensor, View, dora, matmul};

/// Rows of a table that are read at a time.
const BLOCK: usize = 1024;

/// What is known of the norms once the table is there.
#[derive(Debug)]
pub(crate) struct ColumnNorms {
    /// Norms of the columns of W, `[D, 1]` f32.
    table: Tensor,
    /// The unit matrix `[R, R]` f32, a product with which turns A over.
    unit: Tensor,
}

impl ColumnNorms {
    /// Of `table` `[V, D]` and updates of `rank`.
    pub(crate) fn new(table: View<'_>, rank: usize, device: &Device) -> Self {
        let (rows, width) = (table.rows(), table.cols());
        let mut squares = vec![0.0_f64; width];
        for first in (0..rows).step_by(BLOCK) {
            let values = table.row_range(first..rows.min(first + BLOCK)).to_f32_vec();
            for row in values.chunks_exact(width.max(1)) {
                for (sum, value) in squares.iter_mut().zip(row) {
                    *sum += f64::from(*value).powi(2);
                }
            }
        }
        let norms: Vec<f32> = squares.iter().map(|sum| sum.sqrt() as f32).collect();
        let unit = (0..rank * rank).map(|at| f32::from(u8::from(at % (rank + 1) == 0)));
        Self {
            table: Tensor::from_f32(norms, width, 1).to_device(device),
            unit: Tensor::from_f32(unit.collect(), rank, rank).to_device(device),
        }
    }

    /// Of W + scale * B A as B and A are now, `[1, D]` f32; `table` is W.
    pub(crate) fn of(&self, run: &Run<'_>, update: &LowRank, table: View<'_>) -> Result<Tensor> {
        let [rank, width] = [update.rank, table.cols()];
        let [a, b] = [update.a, update.b].map(|id| run.params.view_as(id, run.dtype));
        let mut cross = run.take_fixed(DType::F32, rank, width);
        matmul::tn(cross.view_mut(), 0.0, 1.0, b, table)?;
        let mut gram = run.take_fixed(b.dtype(), rank, rank);
        matmul::tn(gram.view_mut(), 0.0, 1.0, b, b)?;
        let mut spread = run.take_fixed(DType::F32, rank, width);
        matmul::nn(spread.view_mut(), 0.0, 1.0, gram.view(), a)?;
        let mut turned = run.take_fixed(DType::F32, width, rank);
        let a = run.params.view(update.a);
        matmul::tn(turned.view_mut(), 0.0, 1.0, a, self.unit.view())?;
        let mut norms = run.take_fixed(DType::F32, 1, width);
        let of = dora::Operands {
            weight: self.table.view(),
            b: turned.view(),
            cross: cross.view(),
            spread: spread.view(),
            scale: update.scale,
        };
        dora::row_norms(&of, norms.view_mut())?;
        run.give_fixed([cross, gram, spread, turned]);
        Ok(norms)
    }
}
