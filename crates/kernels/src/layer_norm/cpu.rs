use crate::lanes::{LANES, total};
use crate::row_blocks::{RowBlock, blocks, rows_per_block};
use crate::simd::dispatch;
use crate::{Element, Result, Rows, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator, ParallelSlice, ParallelSliceMut};

/// [`super::Affine`] in host memory.
#[derive(Clone, Copy)]
pub(super) struct Affine<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
}

impl<'a> Affine<'a> {
    pub(super) fn of(op: &'static str, affine: super::Affine<'a>) -> Result<Self> {
        Ok(Self {
            weight: affine.weight.contiguous(op, "weight")?,
            bias: affine.bias.contiguous(op, "bias")?,
            eps: affine.eps,
        })
    }

    /// The norm of `x` to `y`, and its mean and reciprocal deviation.
    #[inline(always)]
    fn forward_row<X: Element, Y: Element>(self, x: &[X], y: &mut [Y]) -> [f32; 2] {
        let cols = x.len() as f32;
        let mean = sum(x, |_, x| x.to_f32()) / cols;
        let variance = sum(x, |_, x| (x.to_f32() - mean).powi(2)) / cols;
        let statistics = [mean, (variance + self.eps).sqrt().recip()];
        self.apply_row(x, statistics, y);
        statistics
    }

    #[inline(always)]
    fn apply_row<X: Element, Y: Element>(self, x: &[X], [mean, rstd]: [f32; 2], y: &mut [Y]) {
        for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(self.weight).zip(self.bias) {
            let normed = (x.to_f32() - mean) * rstd;
            *y = Y::from_f32(normed.mul_add(*weight, *bias));
        }
    }
}

pub(super) fn forward<X: Element, Y: Element>(
    x: Rows<'_, X>,
    affine: Affine<'_>,
    mut y: RowsMut<'_, Y>,
    statistics: &mut [f32],
) {
    let step = rows_per_block(x.cols());
    blocks(&mut y)
        .zip(statistics.par_chunks_mut(2 * step))
        .enumerate()
        .for_each(|(block, (mut y, statistics))| {
            dispatch(
                #[inline(always)]
                || {
                    let rows = y.rows().zip(statistics.as_chunks_mut::<2>().0);
                    for (t, (y, statistics)) in (block * step..).zip(rows) {
                        *statistics = affine.forward_row(x.row(t), y);
                    }
                },
            );
        });
}

pub(super) fn add_forward<R: Element, B: Element, Y: Element>(
    mut residual: RowsMut<'_, R>,
    branch: Rows<'_, B>,
    affine: Affine<'_>,
    mut y: RowsMut<'_, Y>,
    statistics: &mut [f32],
) {
    let step = rows_per_block(branch.cols());
    blocks(&mut residual)
        .zip(blocks(&mut y))
        .zip(statistics.par_chunks_mut(2 * step))
        .enumerate()
        .for_each(|(block, ((mut residual, mut y), statistics))| {
            dispatch(
                #[inline(always)]
                || {
                    let rows = residual.rows().zip(y.rows());
                    let rows = rows.zip(statistics.as_chunks_mut::<2>().0);
                    for (t, ((residual, y), statistics)) in (block * step..).zip(rows) {
                        for (residual, branch) in residual.iter_mut().zip(branch.row(t)) {
                            *residual = R::from_f32(residual.to_f32() + branch.to_f32());
                        }
                        *statistics = affine.forward_row(residual, y);
                    }
                },
            );
        });
}

pub(super) fn apply<X: Element, Y: Element>(
    x: Rows<'_, X>,
    affine: Affine<'_>,
    statistics: &[f32],
    mut y: RowsMut<'_, Y>,
) {
    let step = rows_per_block(x.cols());
    blocks(&mut y)
        .zip(statistics.par_chunks(2 * step))
        .enumerate()
        .for_each(|(block, (mut y, statistics))| {
            dispatch(
                #[inline(always)]
                || {
                    let rows = y.rows().zip(statistics.as_chunks::<2>().0);
                    for (t, (y, &statistics)) in (block * step..).zip(rows) {
                        affine.apply_row(x.row(t), statistics, y);
                    }
                },
            );
        });
}

pub(super) fn backward<G: Element, X: Element, D: Element>(
    dy: Rows<'_, G>,
    x: Rows<'_, X>,
    weight: &[f32],
    statistics: &[f32],
    mut dx: RowsMut<'_, D>,
    d_weight: Option<&mut [f32]>,
) {
    let step = rows_per_block(x.cols());
    let trained = d_weight.is_some();
    // Sums per block, added in block order.
    let partial_sums: Vec<Vec<f32>> = blocks(&mut dx)
        .zip(statistics.par_chunks(2 * step))
        .enumerate()
        .map(|(block, (dx, statistics))| {
            let mut sums = vec![0.0; if trained { weight.len() } else { 0 }];
            backward_block(dy, x, weight, statistics, block * step, dx, &mut sums);
            sums
        })
        .collect();
    let Some(d_weight) = d_weight else { return };
    for sums in &partial_sums {
        for (total, sum) in d_weight.iter_mut().zip(sums) {
            *total += sum;
        }
    }
}

/// The rows of `dx`, the first of which is row `first` of `dy` and `x`.
fn backward_block<G: Element, X: Element, D: Element>(
    dy: Rows<'_, G>,
    x: Rows<'_, X>,
    weight: &[f32],
    statistics: &[f32],
    first: usize,
    mut dx: RowBlock<'_, D>,
    d_weight: &mut [f32],
) {
    dispatch(
        #[inline(always)]
        || {
            let rows = dx.rows().zip(statistics.as_chunks::<2>().0);
            for (t, (dx, &[mean, rstd])) in (first..).zip(rows) {
                let (dy, x) = (dy.row(t), x.row(t));
                backward_row(dy, x, weight, [mean, rstd], dx);
                for ((sum, dy), x) in d_weight.iter_mut().zip(dy).zip(x) {
                    *sum = dy.to_f32().mul_add((x.to_f32() - mean) * rstd, *sum);
                }
            }
        },
    );
}

#[inline(always)]
fn backward_row<G: Element, X: Element, D: Element>(
    dy: &[G],
    x: &[X],
    weight: &[f32],
    [mean, rstd]: [f32; 2],
    dx: &mut [D],
) {
    let cols = x.len() as f32;
    let offset = sum(dy, |d, dy| dy.to_f32() * weight[d]) / cols;
    let slope = sum(dy, |d, dy| {
        dy.to_f32() * weight[d] * ((x[d].to_f32() - mean) * rstd)
    }) / cols;
    for (((dx, dy), x), weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
        let normed = (x.to_f32() - mean) * rstd;
        let inner = normed.mul_add(-slope, dy.to_f32().mul_add(*weight, -offset));
        *dx = D::from_f32(inner.mul_add(rstd, dx.to_f32()));
    }
}

/// The sum of `term(index, value)` over a row, in [`LANES`] partial sums.
#[inline(always)]
fn sum<X: Element>(row: &[X], term: impl Fn(usize, X) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for (chunk, values) in whole.iter().enumerate() {
        for (lane, &value) in values.iter().enumerate() {
            lanes[lane] += term(chunk * LANES + lane, value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        lanes[lane] += term(whole.len() * LANES + lane, value);
    }
    total(lanes)
}
