//! `A W^T` on a CPU, for the few rows of A. A product packs W first, which takes longer than multiplying it by 16
//! rows; here rows of W are read as they lie.

use crate::matmul::block::{Matrix, SharedMut, carve, operand, with_scratch};
use crate::simd::dispatch;
use crate::{DType, Element, Rows};
use rayon::prelude::*;

/// Rows of W of a task.
const TILE: usize = 64;
/// Columns at a time: that many of 16 rows of A stay in the first cache.
const DEPTH: usize = 512;
/// Partial sums of a product of two rows.
const LANES: usize = 16;
/// Rows of W and of A whose products are summed at once: as many sums as there are registers, less what is
/// multiplied.
const STEP: [usize; 2] = [2, 8];

/// Writes `a [R, in] weight [out, in]^T` to `cross [R, out]`. The order of additions depends on `in` alone.
pub(super) fn cross<A: Element, W: Element>(
    a: &Rows<'_, A>,
    weight: &Rows<'_, W>,
    cross: &mut [f32],
) {
    let (rank, out, width) = (a.rows(), weight.rows(), weight.cols());
    let target = SharedMut::new(cross);
    let tile = |first: usize| {
        let rows = first..out.min(first + TILE);
        let height = rows.len();
        let blocks = [scratch::<A>(rank), scratch::<W>(height)];
        with_scratch(rank * height + blocks[0] + blocks[1], |mut memory| {
            let sums = carve(&mut memory, rank * height);
            sums.fill(0.0);
            for k in (0..width).step_by(DEPTH) {
                let columns = k..width.min(k + DEPTH);
                let (of_a, of_w) = memory.split_at_mut(blocks[0]);
                let a = operand(a, 0..rank, columns.clone(), of_a);
                let weight = operand(weight, rows.clone(), columns, of_w);
                dispatch(
                    #[inline(always)]
                    || add_products(a, weight, [rank, height], sums),
                );
            }
            for (r, sums) in sums.chunks_exact(height).enumerate() {
                // SAFETY: these columns of row r are of this task alone, and `cross` is borrowed until all end.
                let to = unsafe { target.slice(r * out + rows.start..r * out + rows.end) };
                to.copy_from_slice(sums);
            }
        });
    };
    let tiles = (0..out.div_ceil(TILE)).into_par_iter().with_max_len(1);
    tiles.for_each(|at| tile(at * TILE));
}

fn scratch<T: Element>(rows: usize) -> usize {
    if T::DTYPE == DType::F32 {
        0
    } else {
        rows * DEPTH
    }
}

/// Adds `a w^T` to `sums [R, rows]`.
#[inline(always)]
fn add_products(a: Matrix<'_>, w: Matrix<'_>, [rank, rows]: [usize; 2], sums: &mut [f32]) {
    let [pair, many] = STEP;
    let whole = [rows / pair * pair, rank / many * many];
    for i in (0..whole[0]).step_by(pair) {
        for r in (0..whole[1]).step_by(many) {
            add::<{ STEP[0] }, { STEP[1] }>(a, w, [r, i], rows, sums);
        }
        (whole[1]..rank).for_each(|r| add::<{ STEP[0] }, 1>(a, w, [r, i], rows, sums));
    }
    for i in whole[0]..rows {
        for r in (0..whole[1]).step_by(many) {
            add::<1, { STEP[1] }>(a, w, [r, i], rows, sums);
        }
        (whole[1]..rank).for_each(|r| add::<1, 1>(a, w, [r, i], rows, sums));
    }
}

/// Those of I rows of `w` and R rows of `a`, from `[r, i]` on.
#[inline(always)]
fn add<const I: usize, const R: usize>(
    a: Matrix<'_>,
    w: Matrix<'_>,
    [r, i]: [usize; 2],
    rows: usize,
    sums: &mut [f32],
) {
    let w: [_; I] = std::array::from_fn(|at| w.row(i + at).as_chunks::<LANES>());
    let a: [_; R] = std::array::from_fn(|at| a.row(r + at).as_chunks::<LANES>());
    let mut lanes = [[[0.0_f32; LANES]; R]; I];
    for chunk in 0..w[0].0.len() {
        for (lanes, w) in lanes.iter_mut().zip(&w) {
            let w = &w.0[chunk];
            for (lanes, a) in lanes.iter_mut().zip(&a) {
                let a = &a.0[chunk];
                for l in 0..LANES {
                    lanes[l] = w[l].mul_add(a[l], lanes[l]);
                }
            }
        }
    }
    for (j, (lanes, w)) in lanes.iter().zip(&w).enumerate() {
        for (k, (lanes, a)) in lanes.iter().zip(&a).enumerate() {
            let rest = w.1.iter().zip(a.1).map(|(w, a)| w * a).sum::<f32>();
            sums[(r + k) * rows + i + j] += lanes.iter().sum::<f32>() + rest;
        }
    }
}
