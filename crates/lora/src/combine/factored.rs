//! Sums of low-rank updates that never become whole matrices, and the factors of a matrix that is one.

use super::Pair;
use crate::inspect::read::Factors;
use ferrotune_core::Result;
use ferrotune_kernels::decompose::{Matrix, Svd};
use ferrotune_kernels::rng::Stream;
use ferrotune_kernels::{DType, Tensor, View, matmul};

/// Directions below this, of the largest, are rounding.
const ZERO: f64 = 1e-7;
/// Matrices up to this long on their shorter side are decomposed as a whole.
const WHOLE: usize = 512;
/// Rounds of subspace iteration for larger ones, and directions beside those that are wanted.
const ITERATIONS: u32 = 8;
const MORE: usize = 16;

/// `scale * B A`, `[out, in]`.
pub(super) fn update(factors: &Factors) -> Result<Vec<f32>> {
    let [out, inputs] = factors.shape;
    let mut sum = Tensor::zeros(DType::F32, out, inputs);
    let b = View::from_f32(&factors.b, out, factors.rank);
    let a = View::from_f32(&factors.a, factors.rank, inputs);
    matmul::nn(sum.view_mut(), 0.0, factors.scale, b, a)?;
    Ok(sum.to_f32_vec())
}

/// All A under each other, times weight and scale, and all B side by side.
pub(super) fn side_by_side(updates: &[(&Factors, f64)]) -> Pair {
    let [out, _] = updates.first().map_or([0, 0], |(f, _)| f.shape);
    let scaled = |(f, weight): &(&Factors, f64)| {
        let factor = (weight * f64::from(f.scale)) as f32;
        f.a.iter().map(move |a| a * factor).collect::<Vec<f32>>()
    };
    let row = |i: usize| {
        updates
            .iter()
            .flat_map(move |(f, _)| f.b[i * f.rank..(i + 1) * f.rank].iter().copied())
    };
    Pair {
        a: updates.iter().flat_map(scaled).collect(),
        b: (0..out).flat_map(row).collect(),
        rank: updates.iter().map(|(f, _)| f.rank).sum(),
        relative_error: 0.0,
    }
}

/// The weighted sum, of `rank` or of all the directions it has.
pub(super) fn sum(updates: &[(&Factors, f64)], rank: Option<usize>) -> Result<Pair> {
    let [out, inputs] = updates.first().map_or([0, 0], |(f, _)| f.shape);
    let Pair {
        a, b, rank: all, ..
    } = side_by_side(updates);
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
    let (a, b) = (
        Matrix::new(all, inputs, wide(a))?,
        Matrix::new(out, all, wide(b))?,
    );
    // B A = Q_b (R_b R_a^T) Q_a^T.
    let [q_b, r_b] = b.qr()?;
    let [q_a, r_a] = a.transposed().qr()?;
    let Svd { u, s, vt } = r_b.times_transposed(&r_a)?.svd()?;
    let svd = Svd {
        u: q_b.times(&u)?,
        s,
        vt: vt.times_transposed(&q_a)?,
    };
    let (rank, square) = (rank.unwrap_or(usize::MAX), squares(&svd.s));
    Ok(split(svd, rank, square))
}

/// The best factors of rank `rank` of a matrix.
pub(super) fn of_dense(matrix: &Matrix, rank: usize, stream: Stream) -> Result<Pair> {
    let [rows, cols] = matrix.shape();
    let svd = if rows.min(cols) <= WHOLE.max(2 * rank) {
        matrix.svd()?
    } else {
        matrix.svd_low_rank(rank + MORE, ITERATIONS, stream)?
    };
    Ok(split(svd, rank, squares(matrix.values())))
}

fn squares(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum()
}

/// Of singular values whose squares are `square` in all, the first `rank` that are not zero; each factor gets
/// the root.
fn split(svd: Svd, rank: usize, square: f64) -> Pair {
    let Svd { u, s, vt } = svd;
    let largest = s.first().copied().unwrap_or(0.0);
    let count = s.iter().filter(|&&value| value > ZERO * largest).count();
    let rank = count.clamp(1, rank.max(1)).min(s.len());
    let roots: Vec<f64> = s[..rank].iter().map(|value| value.sqrt()).collect();
    let left_out = (square - squares(&s[..rank])).max(0.0);
    let rows = u.columns(0..rank).columns_scaled(&roots);
    let columns = vt.row_range(0..rank).rows_scaled(&roots);
    Pair {
        a: columns.to_f32_vec(),
        b: rows.to_f32_vec(),
        rank,
        relative_error: if square > 0.0 {
            (left_out / square).sqrt()
        } else {
            0.0
        },
    }
}
