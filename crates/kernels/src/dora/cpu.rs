use crate::lanes::{LANES, total};
use crate::matmul::block::SharedMut;
use crate::simd::dispatch;
use crate::{Element, Rows, RowsMut};
use rayon::prelude::*;

/// Columns a task of backward owns.
const COLUMNS: usize = 512;

/// The low-rank part of the norms, all matrices dense: see [`super::Operands`].
pub(super) struct LowRank<'a> {
    pub(super) b: &'a [f32],
    pub(super) cross: &'a [f32],
    pub(super) spread: &'a [f32],
    pub(super) scale: f32,
}

pub(super) fn row_norms<T: Element>(weight: Rows<'_, T>, of: &LowRank<'_>, norms: &mut [f32]) {
    let out = norms.len();
    let rank = of.b.len() / out.max(1);
    norms
        .par_iter_mut()
        .with_min_len(16)
        .enumerate()
        .for_each(|(i, norm)| {
            let mut sum = f64::from(dispatch(|| squares(weight.row(i))));
            for (r, b) in of.b[i * rank..(i + 1) * rank].iter().enumerate() {
                let (cross, spread) = (of.cross[r * out + i], of.spread[r * out + i]);
                sum += f64::from(of.scale * b * (2.0 * cross + of.scale * spread));
            }
            *norm = sum.max(0.0).sqrt() as f32;
        });
}

/// The sum of the squares of a row.
#[inline(always)]
fn squares<T: Element>(row: &[T]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x.to_f32() * x.to_f32();
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x.to_f32() * x.to_f32();
    }
    total(lanes)
}

pub(super) fn scale<T: Element>(mut y: RowsMut<'_, T>, magnitude: &[f32], norms: &[f32]) {
    let factors = factors(magnitude, norms);
    y.par_rows_mut().with_min_len(16).for_each(|row| {
        dispatch(|| {
            for (y, factor) in row.iter_mut().zip(&factors) {
                *y = T::from_f32(y.to_f32() * factor);
            }
        });
    });
}

pub(super) fn forward<T: Element>(
    mut y: RowsMut<'_, T>,
    mut u: RowsMut<'_, T>,
    magnitude: &[f32],
    norms: &[f32],
) {
    let factors = factors(magnitude, norms);
    let rows = y.par_rows_mut().zip(u.par_rows_mut()).with_min_len(16);
    rows.for_each(|(y, u)| {
        dispatch(|| {
            for ((y, u), factor) in y.iter_mut().zip(u).zip(&factors) {
                *u = *y;
                *y = T::from_f32(y.to_f32() * factor);
            }
        });
    });
}

fn factors(magnitude: &[f32], norms: &[f32]) -> Vec<f32> {
    magnitude.iter().zip(norms).map(|(m, n)| m / n).collect()
}

/// A matrix `[1, out]` each.
pub(super) struct Scaling<'a> {
    pub(super) magnitude: &'a [f32],
    pub(super) norms: &'a [f32],
}

/// A task owns some columns, so that their sums are those of the rows in order.
pub(super) fn backward<T: Element, U: Element>(
    dy: Rows<'_, T>,
    u: Rows<'_, U>,
    of: &Scaling<'_>,
    d_magnitude: &mut [f32],
    mut du: RowsMut<'_, T>,
) {
    let pitch = du.pitch();
    let target = SharedMut::new(du.data_mut());
    let factors = factors(of.magnitude, of.norms);
    let chunks = d_magnitude.par_chunks_mut(COLUMNS).enumerate();
    chunks.for_each(|(chunk, d_magnitude)| {
        let (first, width) = (chunk * COLUMNS, d_magnitude.len());
        let factors = &factors[first..first + width];
        let mut sums = [0.0_f32; COLUMNS];
        for r in 0..dy.rows() {
            let (dy, u) = (&dy.row(r)[first..], &u.row(r)[first..]);
            let start = r * pitch + first;
            // SAFETY: columns of a row of `du` that no other task has; it is borrowed until all end.
            let du = unsafe { target.slice(start..start + width) };
            dispatch(|| {
                let row = du.iter_mut().zip(dy).zip(u);
                for (((du, dy), u), (sum, factor)) in row.zip(sums.iter_mut().zip(factors)) {
                    let dy = dy.to_f32();
                    *sum += dy * u.to_f32();
                    *du = T::from_f32(dy * factor);
                }
            });
        }
        for ((d, sum), norm) in d_magnitude.iter_mut().zip(sums).zip(&of.norms[first..]) {
            *d += sum / norm;
        }
    });
}
