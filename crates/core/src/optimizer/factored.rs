//! Second moments of a matrix as one vector for its rows and one for its columns.

use super::{Gradient, StateValues};
use rayon::prelude::*;

/// Rows that are summed in one go: sums do not depend on the number of threads.
const ROWS: usize = 64;

/// Rows and columns of the matrices that a tensor of `shape` is; `None` for a vector.
pub(super) fn matrix(shape: &[usize]) -> Option<[usize; 2]> {
    match shape {
        [.., rows, cols] => Some([*rows, *cols]),
        _ => None,
    }
}

/// Calls `with` for each matrix of a tensor, with its part of `out`, its gradient and its moments of rows and of
/// columns, the first two of `state`.
pub(super) fn each_matrix(
    [rows, cols]: [usize; 2],
    out: &mut [f32],
    grad: Gradient<'_>,
    state: &mut [StateValues],
    mut with: impl FnMut(&mut [f32], Gradient<'_>, [&mut [f32]; 2]),
) {
    let [of_rows, of_cols, ..] = state else {
        return;
    };
    let matrices = grad
        .values
        .chunks(rows * cols)
        .zip(out.chunks_mut(rows * cols));
    let of_rows = of_rows.f32_mut().chunks_mut(rows);
    let moments = of_rows.zip(of_cols.f32_mut().chunks_mut(cols));
    for ((values, out), (of_rows, of_cols)) in matrices.zip(moments) {
        with(out, Gradient { values, ..grad }, [of_rows, of_cols]);
    }
}

/// Means of the squares of `grad` `[rows, cols]` over its columns and over its rows.
pub(super) fn mean_squares(grad: Gradient<'_>, [rows, cols]: [usize; 2]) -> [Vec<f64>; 2] {
    let scale = f64::from(grad.scale);
    let parts: Vec<(Vec<f64>, Vec<f64>)> = grad
        .values
        .par_chunks((ROWS * cols).max(1))
        .map(|part| {
            let mut of_cols = vec![0.0; cols];
            let sums = part.chunks_exact(cols).map(|row| {
                let mut sum = 0.0;
                for (total, value) in of_cols.iter_mut().zip(row) {
                    let value = f64::from(*value) * scale;
                    sum += value * value;
                    *total += value * value;
                }
                sum / cols as f64
            });
            let of_rows = sums.collect();
            (of_rows, of_cols)
        })
        .collect();
    let mut means = [Vec::with_capacity(rows), vec![0.0; cols]];
    for (of_rows, of_cols) in parts {
        means[0].extend(of_rows);
        for (mean, sum) in means[1].iter_mut().zip(of_cols) {
            *mean += sum / rows as f64;
        }
    }
    means
}

/// `average <- average + weight * (value - average)`.
pub(super) fn average(averages: &mut [f32], values: impl IntoIterator<Item = f64>, weight: f64) {
    for (average, value) in averages.iter_mut().zip(values) {
        let before = f64::from(*average);
        *average = (before + weight * (value - before)) as f32;
    }
}

/// The mean of `values`.
pub(super) fn mean(values: &[f32]) -> f64 {
    values.iter().copied().map(f64::from).sum::<f64>() / values.len() as f64
}

/// `out[r, c] = grad[r, c] * factor(rows[r], cols[c])`.
pub(super) fn precondition(
    out: &mut [f32],
    grad: Gradient<'_>,
    [rows, cols]: [&[f32]; 2],
    factor: impl Fn(f32, f32) -> f32 + Sync,
) {
    let width = cols.len().max(1);
    out.par_chunks_mut(width)
        .zip(grad.values.par_chunks(width))
        .zip(rows)
        .for_each(|((out, grad_row), &of_row)| {
            for ((out, value), &of_col) in out.iter_mut().zip(grad_row).zip(cols) {
                *out = value * grad.scale * factor(of_row, of_col);
            }
        });
}

/// Root of the mean square.
pub(super) fn rms(values: &[f32]) -> f64 {
    ferrotune_kernels::adamw::global_norm(values) / (values.len().max(1) as f64).sqrt()
}
