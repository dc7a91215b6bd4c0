use super::block::{Matrix, SharedMut, gemm_raw, view_flipped, view_operand, with_scratch};
use super::{Layout, Product};
use crate::{DType, Element, RowsMut, View, simd};
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

/// Another product `dst [M',rows] = a [M',K] b[rows]^T` over rows of the same `b` `[N,K]`.
pub(super) struct Beside<'a> {
    a: View<'a>,
    rows: Range<usize>,
    dst: SharedMut<f32>,
    pitch: usize,
}

impl<'a> Beside<'a> {
    /// `dst` is borrowed for as long as this lives.
    pub(super) fn new(a: View<'a>, rows: Range<usize>, dst: &'a mut RowsMut<'_, f32>) -> Self {
        let pitch = dst.pitch();
        let dst = SharedMut::new(dst.data_mut());
        Self {
            a,
            rows,
            dst,
            pitch,
        }
    }

    /// Its part in the columns `cols` of the whole product.
    fn within(&self, cols: &Range<usize>) -> Range<usize> {
        let start = self.rows.start.max(cols.start);
        start..self.rows.end.min(cols.end).max(start)
    }
}

/// The product in tiles of `dst`, whose bounds depend on the shape alone, and those `beside` it, whose values of `b`
/// are then in the cache.
pub(super) fn product<D: Element>(
    mut dst: RowsMut<'_, D>,
    a: View<'_>,
    b: View<'_>,
    product: &Product,
    beside: &[Beside<'_>],
) {
    let (m, n) = (product.m, product.n);
    if n == 0 || (m == 0 && beside.is_empty()) {
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
    let tile_rows = tile_rows.max(1);
    let tiles = Tiles {
        pitch: dst.pitch(),
        dst: SharedMut::new(dst.data_mut()),
        a,
        b,
        product,
        beside,
    };
    // Without rows, what stands beside them is still to be made.
    let row_tiles = m.div_ceil(tile_rows).max(1);
    let run = |tile: usize| {
        let (i, j) = (tile % row_tiles * tile_rows, tile / row_tiles * tile_cols);
        // SAFETY: tiles are disjoint rectangles inside `dst`, and inside those beside it, which are borrowed until all
        // end.
        unsafe { tiles.compute(i..m.min(i + tile_rows), j..n.min(j + tile_cols)) }
    };
    let count = row_tiles * n.div_ceil(tile_cols);
    // The tiles are those of the product alone, so that its bits are.
    let others = beside.iter().map(|of| of.a.rows() * of.rows.len());
    if (m * n + others.sum::<usize>()) * product.k < PARALLEL_WORK {
        (0..count).for_each(run);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(run);
    }
}

/// The length of a tile such that an even number of tiles of at most `longest` covers `len`: two
/// threads then finish together. A multiple of the vector width.
fn even_tiles(len: usize, longest: usize) -> usize {
    let tiles = len.div_ceil(longest).next_multiple_of(2);
    len.div_ceil(tiles).next_multiple_of(16)
}

/// What all tiles of a product share.
struct Tiles<'a, D> {
    dst: SharedMut<D>,
    pitch: usize,
    a: View<'a>,
    b: View<'a>,
    product: &'a Product,
    beside: &'a [Beside<'a>],
}

/// The f32 tile of one product: the `rows` of `a` with the columns `cols` of op(b).
struct Part<'a> {
    a: View<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    dst: *mut f32,
    pitch: usize,
    beta: f32,
    alpha: f32,
}

impl<D: Element> Tiles<'_, D> {
    /// One tile of the result, `product.k` deep, and once for each column what is beside it.
    ///
    /// # Safety
    /// `rows` x `cols` must lie inside the matrix behind `dst`, and be accessed by nobody else; so too the columns
    /// `cols` of those beside it where `rows` are the first.
    unsafe fn compute(&self, rows: Range<usize>, cols: Range<usize>) {
        let (m, n) = (rows.len(), cols.len());
        let start = rows.start * self.pitch + cols.start;
        let beside = if rows.start == 0 { self.beside } else { &[] };
        if D::DTYPE == DType::F32 || m == 0 {
            // SAFETY: D is f32, and the caller vouches for the rectangle.
            unsafe {
                let dst = self.dst.at(if m == 0 { 0 } else { start }).cast::<f32>();
                self.accumulate(dst, self.pitch, self.product.beta, rows, cols, beside);
            }
            return;
        }
        with_scratch(m * n, |sum| {
            // SAFETY: `sum` is [m, n] with pitch n, and belongs to this thread.
            unsafe { self.accumulate(sum.as_mut_ptr(), n, 0.0, rows, cols, beside) };
            for (r, sum) in sum.chunks_exact(n).enumerate() {
                let start = start + r * self.pitch;
                // SAFETY: row r of the rectangle that the caller vouches for.
                let row = unsafe { self.dst.slice(start..start + n) };
                simd::dispatch(
                    #[inline(always)]
                    || round_row(row, self.product.beta, sum),
                );
            }
        });
    }

    /// The f32 tile `dst = beta * dst + alpha * a b` and what is `beside` it.
    ///
    /// # Safety
    /// As [`gemm_raw`], and as [`Tiles::compute`] for those beside.
    unsafe fn accumulate(
        &self,
        dst: *mut f32,
        pitch: usize,
        beta: f32,
        rows: Range<usize>,
        cols: Range<usize>,
        beside: &[Beside<'_>],
    ) {
        let mut parts = Vec::with_capacity(1 + beside.len());
        parts.push(Part {
            a: self.a,
            rows,
            cols: cols.clone(),
            dst,
            pitch,
            beta,
            alpha: self.product.alpha,
        });
        parts.extend(beside.iter().map(|of| {
            let own = of.within(&cols);
            let first = if own.is_empty() || of.a.rows() == 0 {
                0
            } else {
                own.start - of.rows.start
            };
            Part {
                a: of.a,
                rows: 0..of.a.rows(),
                cols: own,
                // SAFETY: a column of the first row of its result, or its start.
                dst: unsafe { of.dst.at(first) },
                pitch: of.pitch,
                beta: 0.0,
                alpha: 1.0,
            }
        }));
        parts.retain(|part| !part.rows.is_empty() && !part.cols.is_empty());
        // SAFETY: the caller's promise.
        unsafe { accumulate(self.b, self.product, &cols, &mut parts) };
    }
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

/// `parts` of products over the columns `cols` of op(b), in steps of at most `TILE_DEPTH`.
///
/// # Safety
/// As [`gemm_raw`], for each of them.
unsafe fn accumulate(b: View<'_>, product: &Product, cols: &Range<usize>, parts: &mut [Part<'_>]) {
    let slow_to_pack = b.dtype() != DType::F32 || b.pitch().is_multiple_of(PAGE);
    let tall = parts.iter().map(|part| part.rows.len()).sum::<usize>() >= TRANSPOSE_ROWS;
    // The crate sums a small product of two K-contiguous operands in another order.
    let small = |part: &Part<'_>| part.rows.len() * part.cols.len() <= HORIZONTAL;
    // With any number of rows but one the bits are the same whether b is transposed first or not.
    let can = |part: &Part<'_>| product.layout == Layout::Nt && part.rows.len() > 1;
    let flip = parts
        .iter()
        .any(|part| can(part) && (small(part) || tall && slow_to_pack));
    let straight = !flip || parts.iter().any(|part| !can(part));
    // A function of K alone: a row of the result has the same bits whatever rows stand beside it.
    let depth = product
        .k
        .div_ceil(product.k.div_ceil(TILE_DEPTH).max(1))
        .max(1);
    let lengths = parts
        .iter()
        .map(|part| scratch_len(part.a, part.rows.len(), depth));
    let scratch_a = lengths.max().unwrap_or(0);
    let scratch_b = if straight {
        scratch_len(b, cols.len(), depth)
    } else {
        0
    };
    let scratch_flipped = if flip { cols.len() * depth } else { 0 };
    with_scratch(scratch_a + scratch_b + scratch_flipped, |scratch| {
        let (scratch_a, scratch) = scratch.split_at_mut(scratch_a);
        let (scratch_b, scratch_flipped) = scratch.split_at_mut(scratch_b);
        // One pass even if K = 0: it scales or zeroes dst.
        for k in (0..product.k.max(1)).step_by(depth) {
            let ks = k..product.k.min(k + depth);
            let flipped = flip.then(|| view_flipped(b, cols.clone(), ks.clone(), scratch_flipped));
            let [b_rows, b_cols] = match product.layout {
                Layout::Nt => [cols.clone(), ks.clone()],
                Layout::Nn | Layout::Tn => [ks.clone(), cols.clone()],
            };
            let plain = if straight {
                view_operand(b, b_rows, b_cols, scratch_b)
            } else {
                Matrix::new(&[], 0, 0, 0)
            };
            for part in &mut *parts {
                let own = part.cols.start - cols.start..part.cols.end - cols.start;
                let b = match (flipped, product.layout) {
                    (Some(flipped), _) if can(part) => flipped.columns(own),
                    (_, Layout::Nt) => plain.rows(own).transposed(),
                    (_, Layout::Nn | Layout::Tn) => plain.columns(own),
                };
                let rows = part.rows.clone();
                let a = match product.layout {
                    Layout::Nt | Layout::Nn => view_operand(part.a, rows, ks.clone(), scratch_a),
                    Layout::Tn => view_operand(part.a, ks.clone(), rows, scratch_a).transposed(),
                };
                // SAFETY: the caller's promise.
                unsafe { gemm_raw(part.dst, part.pitch, part.beta, part.alpha, a, b) };
                part.beta = 1.0;
            }
        }
    });
}

/// Room for a block of `source` in f32, if it is not.
fn scratch_len(source: View<'_>, rows: usize, depth: usize) -> usize {
    if source.dtype() == DType::F32 {
        0
    } else {
        rows * depth
    }
}
