use super::block::{SharedMut, flipped, gemm_raw, operand, with_scratch};
use super::{Layout, Product};
use crate::{DType, Element, Rows, RowsMut, simd};
use rayon::prelude::*;
use std::ops::Range;

/// Multiply-adds below which one thread is quicker than waking another.
const PARALLEL_WORK: usize = 1 << 19;
/// Longest tile in rows of `dst`. A longer one leaves other threads idle on short batches; a
/// shorter one repacks `b` more often.
const TILE_ROWS: usize = 512;
/// Longest tile in columns of `dst`.
const TILE_COLS: usize = 384;
/// At most this many columns are never split: the tiles are rows alone.
const NARROW: usize = 64;
/// Rows of a tile of a narrow product.
const NARROW_ROWS: usize = 256;
/// From this many rows there are tiles enough for all threads without splitting the columns evenly.
const TALL: usize = 8 * TILE_ROWS;
/// Most rows times columns that the `gemm` crate multiplies by its horizontal kernel.
const HORIZONTAL: usize = 16 * 16;
/// Longest sum of one call, and depth converted or transposed at once: with `TILE_COLS`, 768 KiB of
/// f32, which stays in L2. Up to 512 the crate does not cut the sum further.
const TILE_DEPTH: usize = 512;
/// Rows of f32 that start a multiple of 4 KiB apart fall on the same cache sets; packing them costs
/// the gemm crate a fifth of its speed at 512 rows of `dst`, transposing them first half of that.
const PAGE: usize = 1024;
/// Rows of `dst` from which transposing a block of `b` first pays for itself.
const TRANSPOSE_ROWS: usize = 48;

/// The product in tiles of `dst`, whose bounds depend on the shape alone.
pub(super) fn product<D: Element, A: Element, B: Element>(
    mut dst: RowsMut<'_, D>,
    a: Rows<'_, A>,
    b: Rows<'_, B>,
    product: &Product,
) {
    let (m, n) = (product.m, product.n);
    if m == 0 || n == 0 {
        return;
    }
    let (tile_rows, tile_cols) = if m * n * product.k < PARALLEL_WORK {
        (m.min(TILE_ROWS), n.min(TILE_COLS))
    } else if n <= NARROW {
        (even_tiles(m, NARROW_ROWS), n)
    } else if m >= TALL {
        (TILE_ROWS, n.div_ceil(n.div_ceil(TILE_COLS)))
    } else {
        (m.div_ceil(m.div_ceil(TILE_ROWS)), even_tiles(n, TILE_COLS))
    };
    let pitch = dst.pitch();
    let target = SharedMut::new(dst.data_mut());
    let row_tiles = m.div_ceil(tile_rows);
    let run = |tile: usize| {
        let (i, j) = (tile % row_tiles * tile_rows, tile / row_tiles * tile_cols);
        let (rows, cols) = (i..m.min(i + tile_rows), j..n.min(j + tile_cols));
        // SAFETY: tiles are disjoint rectangles inside `dst`, which is borrowed until all end.
        unsafe { compute_tile(&target, pitch, &a, &b, product, rows, cols) }
    };
    let tiles = row_tiles * n.div_ceil(tile_cols);
    if m * n * product.k < PARALLEL_WORK {
        (0..tiles).for_each(run);
    } else {
        (0..tiles).into_par_iter().with_max_len(1).for_each(run);
    }
}

/// The length of a tile such that an even number of tiles of at most `longest` covers `len`: two
/// threads then finish together. A multiple of the vector width.
fn even_tiles(len: usize, longest: usize) -> usize {
    let tiles = len.div_ceil(longest).next_multiple_of(2);
    len.div_ceil(tiles).next_multiple_of(16)
}

/// One tile of the result, `product.k` deep.
///
/// # Safety
/// `rows` x `cols` must lie inside the matrix behind `dst`, and be accessed by nobody else.
unsafe fn compute_tile<D: Element, A: Element, B: Element>(
    dst: &SharedMut<D>,
    pitch: usize,
    a: &Rows<'_, A>,
    b: &Rows<'_, B>,
    product: &Product,
    rows: Range<usize>,
    cols: Range<usize>,
) {
    let (m, n) = (rows.len(), cols.len());
    let start = rows.start * pitch + cols.start;
    if D::DTYPE == DType::F32 {
        // SAFETY: D is f32, and the caller vouches for the rectangle.
        unsafe {
            let dst = dst.at(start).cast::<f32>();
            accumulate(dst, pitch, product.beta, a, b, product, rows, cols);
        }
        return;
    }
    with_scratch(m * n, |sum| {
        // SAFETY: `sum` is [m, n] with pitch n, and belongs to this thread.
        unsafe { accumulate(sum.as_mut_ptr(), n, 0.0, a, b, product, rows, cols) };
        for (r, sum) in sum.chunks_exact(n).enumerate() {
            // SAFETY: row r of the rectangle that the caller vouches for.
            let row = unsafe { dst.slice(start + r * pitch..start + r * pitch + n) };
            simd::dispatch(
                #[inline(always)]
                || round_row(row, product.beta, sum),
            );
        }
    });
}

#[inline(always)]
fn round_row<D: Element>(row: &mut [D], beta: f32, sum: &[f32]) {
    if beta == 0.0 {
        for (to, &sum) in row.iter_mut().zip(sum) {
            *to = D::from_f32(sum);
        }
    } else {
        for (to, &sum) in row.iter_mut().zip(sum) {
            *to = D::from_f32(beta.mul_add(to.to_f32(), sum));
        }
    }
}

/// The f32 tile: `dst = beta * dst + alpha * a b`, in steps of at most `TILE_DEPTH`.
///
/// # Safety
/// As [`gemm_raw`].
#[expect(
    clippy::too_many_arguments,
    reason = "a tile of a product of two matrices"
)]
unsafe fn accumulate<A: Element, B: Element>(
    dst: *mut f32,
    pitch: usize,
    beta: f32,
    a: &Rows<'_, A>,
    b: &Rows<'_, B>,
    product: &Product,
    rows: Range<usize>,
    cols: Range<usize>,
) {
    let slow_to_pack = B::DTYPE != DType::F32 || b.pitch().is_multiple_of(PAGE);
    // The crate sums a small product of two K-contiguous operands in another order.
    let small = rows.len() * cols.len() <= HORIZONTAL;
    let long = rows.len() >= TRANSPOSE_ROWS && slow_to_pack;
    let flip = product.layout == Layout::Nt && rows.len() > 1 && (small || long);
    // A function of K alone: a row of the result has the same bits whatever rows stand beside it.
    let depth = product
        .k
        .div_ceil(product.k.div_ceil(TILE_DEPTH).max(1))
        .max(1);
    let scratch_a = scratch_len::<A>(rows.len(), depth);
    let scratch_b = if flip {
        cols.len() * depth
    } else {
        scratch_len::<B>(cols.len(), depth)
    };
    with_scratch(scratch_a + scratch_b, |scratch| {
        let (scratch_a, scratch_b) = scratch.split_at_mut(scratch_a);
        let mut beta = beta;
        // One pass even if K = 0: it scales or zeroes dst.
        for k in (0..product.k.max(1)).step_by(depth) {
            let ks = k..product.k.min(k + depth);
            let a = match product.layout {
                Layout::Nt | Layout::Nn => operand(a, rows.clone(), ks.clone(), scratch_a),
                Layout::Tn => operand(a, ks.clone(), rows.clone(), scratch_a).transposed(),
            };
            let b = match product.layout {
                Layout::Nt if flip => flipped(b, cols.clone(), ks, scratch_b),
                Layout::Nt => operand(b, cols.clone(), ks, scratch_b).transposed(),
                Layout::Nn | Layout::Tn => operand(b, ks, cols.clone(), scratch_b),
            };
            // SAFETY: the caller's promise.
            unsafe { gemm_raw(dst, pitch, beta, product.alpha, a, b) };
            beta = 1.0;
        }
    });
}

fn scratch_len<T: Element>(rows: usize, depth: usize) -> usize {
    if T::DTYPE == DType::F32 {
        0
    } else {
        rows * depth
    }
}
