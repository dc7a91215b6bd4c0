use crate::row_blocks::{blocks, rows_per_block};
use crate::simd::dispatch;
use crate::{Element, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator};

/// Cosines and sines of `half` angles per row.
#[derive(Clone, Copy)]
pub(super) struct Angles<'a> {
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    pub(super) half: usize,
}

impl<'a> Angles<'a> {
    #[inline(always)]
    fn row(&self, t: usize) -> (&'a [f32], &'a [f32]) {
        let range = t * self.half..(t + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

pub(super) fn apply<X: Element, const TRANSPOSE: bool>(
    mut x: RowsMut<'_, X>,
    head_dim: usize,
    angles: Angles<'_>,
) {
    let step = rows_per_block(x.cols());
    blocks(&mut x).enumerate().for_each(|(block, mut x)| {
        dispatch(
            #[inline(always)]
            || {
                for (t, row) in (block * step..).zip(x.rows()) {
                    let (cos, sin) = angles.row(t);
                    for head in row.chunks_exact_mut(head_dim) {
                        let (low, high) = head[..2 * angles.half].split_at_mut(angles.half);
                        rotate::<X, TRANSPOSE>(low, high, cos, sin);
                    }
                }
            },
        );
    });
}

#[inline(always)]
fn rotate<X: Element, const TRANSPOSE: bool>(
    low: &mut [X],
    high: &mut [X],
    cos: &[f32],
    sin: &[f32],
) {
    for (((low, high), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let sin = if TRANSPOSE { -sin } else { sin };
        let (a, b) = (low.to_f32(), high.to_f32());
        *low = X::from_f32(a.mul_add(cos, -(b * sin)));
        *high = X::from_f32(b.mul_add(cos, a * sin));
    }
}
