use crate::lanes::{LANES, total};
use crate::row_blocks::{RowBlock, blocks, rows_per_block};
use crate::simd::dispatch;
use crate::{Element, Rows, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator, ParallelSlice, ParallelSliceMut};

pub(super) fn forward<X: Element, Y: Element>(
    x: Rows<'_, X>,
    weight: &[f32],
    eps: f32,
    mut y: RowsMut<'_, Y>,
    rstd: &mut [f32],
) {
    let step = rows_per_block(x.cols());
    blocks(&mut y)
        .zip(rstd.par_chunks_mut(step))
        .enumerate()
        .for_each(|(block, (mut y, rstd))| {
            dispatch(
                #[inline(always)]
                || {
                    for (t, (y, rstd)) in (block * step..).zip(y.rows().zip(rstd)) {
                        let x = x.row(t);
                        *rstd = reciprocal_root(sum_of_squares(x), x.len(), eps);
                        scale_row(x, weight, *rstd, y);
                    }
                },
            );
        });
}

pub(super) fn add_forward<R: Element, B: Element, Y: Element>(
    mut residual: RowsMut<'_, R>,
    branch: Rows<'_, B>,
    weight: &[f32],
    eps: f32,
    mut y: RowsMut<'_, Y>,
    rstd: &mut [f32],
) {
    let step = rows_per_block(branch.cols());
    blocks(&mut residual)
        .zip(blocks(&mut y))
        .zip(rstd.par_chunks_mut(step))
        .enumerate()
        .for_each(|(block, ((mut residual, mut y), rstd))| {
            dispatch(
                #[inline(always)]
                || {
                    let rows = residual.rows().zip(y.rows()).zip(rstd);
                    for (t, ((residual, y), rstd)) in (block * step..).zip(rows) {
                        let squares = add_and_sum_squares(residual, branch.row(t));
                        *rstd = reciprocal_root(squares, residual.len(), eps);
                        scale_row(residual, weight, *rstd, y);
                    }
                },
            );
        });
}

pub(super) fn apply<X: Element, Y: Element>(
    x: Rows<'_, X>,
    weight: &[f32],
    rstd: &[f32],
    mut y: RowsMut<'_, Y>,
) {
    let step = rows_per_block(x.cols());
    blocks(&mut y)
        .zip(rstd.par_chunks(step))
        .enumerate()
        .for_each(|(block, (mut y, rstd))| {
            dispatch(
                #[inline(always)]
                || {
                    for (t, (y, &rstd)) in (block * step..).zip(y.rows().zip(rstd)) {
                        scale_row(x.row(t), weight, rstd, y);
                    }
                },
            );
        });
}

pub(super) fn backward<G: Element, X: Element, D: Element>(
    dy: Rows<'_, G>,
    x: Rows<'_, X>,
    weight: &[f32],
    rstd: &[f32],
    mut dx: RowsMut<'_, D>,
    d_weight: Option<&mut [f32]>,
) {
    let step = rows_per_block(x.cols());
    let Some(d_weight) = d_weight else {
        blocks(&mut dx)
            .enumerate()
            .for_each(|(block, dx)| backward_block(dy, x, weight, rstd, block * step, dx, None));
        return;
    };
    let partial_sums: Vec<Vec<f32>> = blocks(&mut dx)
        .enumerate()
        .map(|(block, dx)| {
            let mut sums = vec![0.0; weight.len()];
            backward_block(dy, x, weight, rstd, block * step, dx, Some(&mut sums));
            sums
        })
        .collect();
    for sums in &partial_sums {
        for (total, sum) in d_weight.iter_mut().zip(sums) {
            *total += sum;
        }
    }
}

/// The rows of `dx`, the first of which is row `first` of the other matrices.
fn backward_block<G: Element, X: Element, D: Element>(
    dy: Rows<'_, G>,
    x: Rows<'_, X>,
    weight: &[f32],
    rstd: &[f32],
    first: usize,
    mut dx: RowBlock<'_, D>,
    mut d_weight: Option<&mut [f32]>,
) {
    dispatch(
        #[inline(always)]
        || {
            for (t, dx) in (first..).zip(dx.rows()) {
                let (dy, x, rstd) = (dy.row(t), x.row(t), rstd[t]);
                backward_row(dy, x, weight, rstd, dx);
                if let Some(d_weight) = &mut d_weight {
                    for ((sum, dy), x) in d_weight.iter_mut().zip(dy).zip(x) {
                        *sum = (dy.to_f32() * rstd).mul_add(x.to_f32(), *sum);
                    }
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
    rstd: f32,
    dx: &mut [D],
) {
    let slope = sum_of_products(dy, x, weight) * rstd * rstd / x.len() as f32;
    for (((dx, dy), x), weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
        let inner = x.to_f32().mul_add(-slope, dy.to_f32() * weight);
        *dx = D::from_f32(inner.mul_add(rstd, dx.to_f32()));
    }
}

#[inline(always)]
fn scale_row<X: Element, Y: Element>(x: &[X], weight: &[f32], rstd: f32, y: &mut [Y]) {
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = Y::from_f32(x.to_f32() * rstd * weight);
    }
}

#[inline(always)]
pub(crate) fn reciprocal_root(sum_of_squares: f32, cols: usize, eps: f32) -> f32 {
    (sum_of_squares / cols as f32 + eps).sqrt().recip()
}

#[inline(always)]
pub(crate) fn sum_of_squares<X: Element>(x: &[X]) -> f32 {
    #[inline(always)]
    fn step<X: Element>(lanes: &mut [f32; LANES], x: &[X]) {
        for (lane, x) in lanes.iter_mut().zip(x) {
            let x = x.to_f32();
            *lane = x.mul_add(x, *lane);
        }
    }
    let mut lanes = [0.0; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        step(&mut lanes, chunk);
    }
    step(&mut lanes, rest);
    total(lanes)
}

/// `residual += branch`; the sum of squares of the residual as stored.
#[inline(always)]
fn add_and_sum_squares<R: Element, B: Element>(residual: &mut [R], branch: &[B]) -> f32 {
    #[inline(always)]
    fn step<R: Element, B: Element>(lanes: &mut [f32; LANES], residual: &mut [R], branch: &[B]) {
        for ((lane, residual), branch) in lanes.iter_mut().zip(residual).zip(branch) {
            *residual = R::from_f32(residual.to_f32() + branch.to_f32());
            let stored = residual.to_f32();
            *lane = stored.mul_add(stored, *lane);
        }
    }
    let mut lanes = [0.0; LANES];
    let (whole, rest) = residual.as_chunks_mut::<LANES>();
    let (branch_whole, branch_rest) = branch.as_chunks::<LANES>();
    for (residual, branch) in whole.iter_mut().zip(branch_whole) {
        step(&mut lanes, residual, branch);
    }
    step(&mut lanes, rest, branch_rest);
    total(lanes)
}

/// `sum_d dy[d] * weight[d] * x[d]`.
#[inline(always)]
pub(crate) fn sum_of_products<G: Element, X: Element>(dy: &[G], x: &[X], weight: &[f32]) -> f32 {
    #[inline(always)]
    fn step<G: Element, X: Element>(lanes: &mut [f32; LANES], dy: &[G], x: &[X], weight: &[f32]) {
        for (((lane, dy), x), weight) in lanes.iter_mut().zip(dy).zip(x).zip(weight) {
            *lane = (dy.to_f32() * weight).mul_add(x.to_f32(), *lane);
        }
    }
    let mut lanes = [0.0; LANES];
    let (dy_whole, dy_rest) = dy.as_chunks::<LANES>();
    let (x_whole, x_rest) = x.as_chunks::<LANES>();
    let (weight_whole, weight_rest) = weight.as_chunks::<LANES>();
    for ((dy, x), weight) in dy_whole.iter().zip(x_whole).zip(weight_whole) {
        step(&mut lanes, dy, x, weight);
    }
    step(&mut lanes, dy_rest, x_rest, weight_rest);
    total(lanes)
}
