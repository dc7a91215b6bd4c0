use crate::row_blocks::{blocks, rows_per_block, typed};
use crate::simd::dispatch;
use crate::{Element, Rows, RowsMut, Tensor};
use rayon::prelude::*;

/// Columns a task of the column sums owns.
const COLUMNS: usize = 512;

/// A matrix whose only row, or only column, may stand for all.
pub(super) struct Operand<'a, T> {
    rows: Rows<'a, T>,
}

/// A row of an operand.
#[derive(Clone, Copy)]
enum Row<'a, T> {
    Of(&'a [T]),
    /// One value in every column.
    Same(f32),
}

impl<'a, T: Element> Operand<'a, T> {
    pub(super) fn of(rows: Rows<'a, T>) -> Self {
        Self { rows }
    }

    fn row(&self, r: usize) -> Row<'_, T> {
        let row = self.rows.row(if self.rows.rows() == 1 { 0 } else { r });
        match row {
            [value] => Row::Same(value.to_f32()),
            row => Row::Of(row),
        }
    }

    /// Columns from `first` on.
    fn part(&self, r: usize, first: usize) -> Row<'_, T> {
        match self.row(r) {
            Row::Of(row) => Row::Of(&row[first..]),
            same => same,
        }
    }
}

/// Calls `with` for each of `out` with the product of `a` and `b` there.
#[inline(always)]
fn products<O, A: Element, B: Element>(
    out: &mut [O],
    a: Row<'_, A>,
    b: Row<'_, B>,
    mut with: impl FnMut(&mut O, f32),
) {
    match (a, b) {
        (Row::Of(a), Row::Of(b)) => {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                with(out, a.to_f32() * b.to_f32());
            }
        }
        (Row::Of(a), Row::Same(b)) => {
            for (out, a) in out.iter_mut().zip(a) {
                with(out, a.to_f32() * b);
            }
        }
        (Row::Same(a), Row::Of(b)) => {
            for (out, b) in out.iter_mut().zip(b) {
                with(out, a * b.to_f32());
            }
        }
        (Row::Same(a), Row::Same(b)) => out.iter_mut().for_each(|out| with(out, a * b)),
    }
}

/// [`products`] of whole matrices, in blocks of rows.
fn all_products<O: Element, A: Element, B: Element>(
    mut out: RowsMut<'_, O>,
    a: &Operand<'_, A>,
    b: &Operand<'_, B>,
    with: impl Fn(&mut O, f32) + Sync,
) {
    let step = rows_per_block(out.cols());
    let blocks = blocks(&mut out).enumerate();
    blocks.for_each(|(block, mut out)| {
        dispatch(
            #[inline(always)]
            || {
                for (r, out) in (block * step..).zip(out.rows()) {
                    products(out, a.row(r), b.row(r), &with);
                }
            },
        );
    });
}

pub(super) fn add<O: Element, A: Element, B: Element>(
    out: RowsMut<'_, O>,
    [beta, alpha]: [f32; 2],
    a: &Operand<'_, A>,
    b: &Operand<'_, B>,
) {
    all_products(out, a, b, |out, product| {
        let old = if beta == 0.0 {
            0.0
        } else {
            beta * out.to_f32()
        };
        *out = O::from_f32(alpha.mul_add(product, old));
    });
}

pub(super) fn scale<O: Element, B: Element>(out: RowsMut<'_, O>, offset: f32, b: &Operand<'_, B>) {
    // A single element stands for all.
    let ones = Tensor::from_f32(vec![1.0], 1, 1);
    let ones = Operand::<f32>::of(typed(ones.view()));
    all_products(out, &ones, b, |out, b| {
        *out = O::from_f32(out.to_f32() * (offset + b));
    });
}

pub(super) fn add_row_sums<A: Element, B: Element>(
    sums: &mut [f32],
    alpha: f32,
    cols: usize,
    a: &Operand<'_, A>,
    b: &Operand<'_, B>,
) {
    let rows = sums.par_iter_mut().enumerate();
    rows.with_min_len(16).for_each(|(r, sum)| {
        let mut total = 0.0_f64;
        let mut places = vec![(); cols];
        products(&mut places, a.row(r), b.row(r), |(), product| {
            total += f64::from(product);
        });
        *sum += alpha * total as f32;
    });
}

pub(super) fn add_column_sums<A: Element, B: Element>(
    sums: &mut [f32],
    alpha: f32,
    rows: usize,
    a: &Operand<'_, A>,
    b: &Operand<'_, B>,
) {
    let chunks = sums.par_chunks_mut(COLUMNS).enumerate();
    chunks.for_each(|(chunk, sums)| {
        let (first, mut totals) = (chunk * COLUMNS, [0.0_f32; COLUMNS]);
        let totals = &mut totals[..sums.len()];
        dispatch(
            #[inline(always)]
            || {
                for r in 0..rows {
                    products(
                        totals,
                        a.part(r, first),
                        b.part(r, first),
                        |total, product| {
                            *total += product;
                        },
                    );
                }
            },
        );
        for (sum, total) in sums.iter_mut().zip(totals) {
            *sum += alpha * *total;
        }
    });
}
