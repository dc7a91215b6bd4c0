use crate::row_blocks::{blocks, rows_per_block};
use crate::simd::dispatch;
use crate::{Element, Rows, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator};

pub(super) fn add<Y: Element, X: Element>(a: f32, mut y: RowsMut<'_, Y>, b: f32, x: Rows<'_, X>) {
    let step = rows_per_block(y.cols());
    blocks(&mut y).enumerate().for_each(|(block, mut y)| {
        dispatch(
            #[inline(always)]
            || {
                for (t, y) in (block * step..).zip(y.rows()) {
                    add_row(a, y, b, x.row(t));
                }
            },
        );
    });
}

#[inline(always)]
fn add_row<Y: Element, X: Element>(a: f32, y: &mut [Y], b: f32, x: &[X]) {
    for (y, x) in y.iter_mut().zip(x) {
        let old = if a == 0.0 { 0.0 } else { a * y.to_f32() };
        *y = Y::from_f32(b.mul_add(x.to_f32(), old));
    }
}

pub(super) fn scale<Y: Element>(a: f32, mut y: RowsMut<'_, Y>) {
    blocks(&mut y).for_each(|mut y| {
        dispatch(
            #[inline(always)]
            || {
                for row in y.rows() {
                    row.iter_mut()
                        .for_each(|y| *y = Y::from_f32(a * y.to_f32()));
                }
            },
        );
    });
}
