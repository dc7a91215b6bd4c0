use crate::rms_norm::cpu::{reciprocal_root, sum_of_products, sum_of_squares};
use crate::row_blocks::{RowBlock, blocks, rows_per_block};
use crate::simd::dispatch;
use crate::{Element, Rows, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator};

/// The norm of a head, `offset` in its weight, and `half` angles per row.
pub(super) struct Norm<'a> {
    pub(super) weight: Vec<f32>,
    pub(super) eps: f32,
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    pub(super) half: usize,
}

impl Norm<'_> {
    #[inline(always)]
    fn angles(&self, t: usize) -> (&[f32], &[f32]) {
        let range = t * self.half..(t + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

pub(super) fn forward<X: Element, Y: Element>(
    x: Rows<'_, X>,
    norm: &Norm<'_>,
    mut out: RowsMut<'_, Y>,
) {
    let (step, head_dim) = (rows_per_block(out.cols()), norm.weight.len());
    blocks(&mut out).enumerate().for_each(|(block, mut out)| {
        dispatch(
            #[inline(always)]
            || {
                for (t, out) in (block * step..).zip(out.rows()) {
                    let heads = x.row(t).chunks_exact(head_dim);
                    for (x, out) in heads.zip(out.chunks_exact_mut(head_dim)) {
                        forward_head(x, norm, norm.angles(t), out);
                    }
                }
            },
        );
    });
}

#[inline(always)]
fn forward_head<X: Element, Y: Element>(
    x: &[X],
    norm: &Norm<'_>,
    (cos, sin): (&[f32], &[f32]),
    out: &mut [Y],
) {
    let rstd = reciprocal_root(sum_of_squares(x), x.len(), norm.eps);
    let half = norm.half;
    let (x_low, x_high) = x.split_at(half);
    let (w_low, w_high) = norm.weight.split_at(half);
    let (out_low, out_high) = out.split_at_mut(half);
    for i in 0..half {
        let a = x_low[i].to_f32() * rstd * w_low[i];
        let b = x_high[i].to_f32() * rstd * w_high[i];
        out_low[i] = Y::from_f32(a.mul_add(cos[i], -(b * sin[i])));
        out_high[i] = Y::from_f32(b.mul_add(cos[i], a * sin[i]));
    }
    let rest = x_high.iter().zip(w_high).zip(out_high).skip(half);
    for ((x, weight), out) in rest {
        *out = Y::from_f32(x.to_f32() * rstd * weight);
    }
}

pub(super) fn backward_in_place<G: Element, X: Element>(
    mut d: RowsMut<'_, G>,
    x: Rows<'_, X>,
    norm: &Norm<'_>,
    d_weight: Option<&mut [f32]>,
) {
    let step = rows_per_block(d.cols());
    let Some(d_weight) = d_weight else {
        blocks(&mut d)
            .enumerate()
            .for_each(|(block, d)| backward_block(d, x, norm, block * step, None));
        return;
    };
    // A sum per block, added in their order: the same bits for any number of threads.
    let partial_sums: Vec<Vec<f32>> = blocks(&mut d)
        .enumerate()
        .map(|(block, d)| {
            let mut sums = vec![0.0; norm.weight.len()];
            backward_block(d, x, norm, block * step, Some(&mut sums));
            sums
        })
        .collect();
    for sums in &partial_sums {
        for (total, sum) in d_weight.iter_mut().zip(sums) {
            *total += sum;
        }
    }
}

/// The rows of `d`, the first of which is row `first` of the other matrices.
fn backward_block<G: Element, X: Element>(
    mut d: RowBlock<'_, G>,
    x: Rows<'_, X>,
    norm: &Norm<'_>,
    first: usize,
    mut d_weight: Option<&mut [f32]>,
) {
    let head_dim = norm.weight.len();
    dispatch(
        #[inline(always)]
        || {
            let mut dy = vec![0.0; head_dim];
            for (t, d) in (first..).zip(d.rows()) {
                let heads = x.row(t).chunks_exact(head_dim);
                for (x, d) in heads.zip(d.chunks_exact_mut(head_dim)) {
                    let rstd = reciprocal_root(sum_of_squares(x), head_dim, norm.eps);
                    rotate_back(d, norm.half, norm.angles(t), &mut dy);
                    if let Some(d_weight) = &mut d_weight {
                        for ((sum, dy), x) in d_weight.iter_mut().zip(&dy).zip(x) {
                            *sum = (dy * rstd).mul_add(x.to_f32(), *sum);
                        }
                    }
                    backward_head(&dy, x, &norm.weight, rstd, d);
                }
            }
        },
    );
}

/// `dy` of a head from the gradient `d` behind its rotation.
#[inline(always)]
fn rotate_back<G: Element>(d: &[G], half: usize, (cos, sin): (&[f32], &[f32]), dy: &mut [f32]) {
    let (d_low, d_high) = d.split_at(half);
    let (dy_low, dy_high) = dy.split_at_mut(half);
    for i in 0..half {
        let (a, b) = (d_low[i].to_f32(), d_high[i].to_f32());
        dy_low[i] = a.mul_add(cos[i], b * sin[i]);
        dy_high[i] = b.mul_add(cos[i], -(a * sin[i]));
    }
    for (dy, d) in dy_high.iter_mut().zip(d_high).skip(half) {
        *dy = d.to_f32();
    }
}

#[inline(always)]
fn backward_head<G: Element, X: Element>(
    dy: &[f32],
    x: &[X],
    weight: &[f32],
    rstd: f32,
    d: &mut [G],
) {
    let slope = sum_of_products(dy, x, weight) * rstd * rstd / x.len() as f32;
    for (((d, dy), x), weight) in d.iter_mut().zip(dy).zip(x).zip(weight) {
        *d = G::from_f32(x.to_f32().mul_add(-slope, dy * weight) * rstd);
    }
}
