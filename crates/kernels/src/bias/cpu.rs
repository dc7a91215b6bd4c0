use crate::simd::dispatch;
use crate::{Element, Rows, RowsMut};
use rayon::prelude::*;

/// Columns a task of backward owns.
const COLUMNS: usize = 512;

pub(super) fn add<T: Element>(mut y: RowsMut<'_, T>, scale: f32, bias: &[f32]) {
    y.par_rows_mut().with_min_len(16).for_each(|row| {
        dispatch(|| {
            for (y, b) in row.iter_mut().zip(bias) {
                *y = T::from_f32(y.to_f32() + scale * b);
            }
        });
    });
}

pub(super) fn backward<T: Element>(dy: Rows<'_, T>, scale: f32, d_bias: &mut [f32]) {
    d_bias
        .par_chunks_mut(COLUMNS)
        .enumerate()
        .for_each(|(chunk, d_bias)| {
            let first = chunk * COLUMNS;
            dispatch(|| {
                for r in 0..dy.rows() {
                    for (d, dy) in d_bias.iter_mut().zip(&dy.row(r)[first..]) {
                        *d += scale * dy.to_f32();
                    }
                }
            });
        });
}
