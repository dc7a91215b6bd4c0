//! Copies a block of a matrix to f32, transposed.

use crate::Element;

/// Columns handled together: one cache line of f32, half a line of bf16.
const TILE: usize = 16;

/// `dst[c * pitch + r] = source[r][c]` for `cols` columns from `first` of the rows `source(r)`,
/// `r < rows`.
#[inline(always)]
pub(super) fn transpose<'a, T: Element>(
    source: impl Fn(usize) -> &'a [T],
    rows: usize,
    cols: usize,
    dst: &mut [f32],
    pitch: usize,
) {
    let (whole_rows, whole_cols) = (rows / TILE * TILE, cols / TILE * TILE);
    // Along the rows first: 16 streams of reads that the processor can prefetch.
    for r in (0..whole_rows).step_by(TILE) {
        let lines: [&[T]; TILE] = std::array::from_fn(|i| source(r + i));
        for c in (0..whole_cols).step_by(TILE) {
            let mut values = [[0.0; TILE]; TILE];
            for (to, from) in values.iter_mut().zip(lines) {
                for (to, from) in to.iter_mut().zip(&from[c..c + TILE]) {
                    *to = from.to_f32();
                }
            }
            tile(&mut values);
            for (i, values) in values.iter().enumerate() {
                dst[(c + i) * pitch + r..][..TILE].copy_from_slice(values);
            }
        }
    }
    for r in 0..rows {
        let first = if r < whole_rows { whole_cols } else { 0 };
        for (c, value) in source(r)[..cols].iter().enumerate().skip(first) {
            dst[c * pitch + r] = value.to_f32();
        }
    }
}

/// Transposes a 16 x 16 tile: four rounds, each swapping the blocks off the diagonal at distance
/// 1, 2, 4 and 8.
#[inline(always)]
fn tile(t: &mut [[f32; TILE]; TILE]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512.
        unsafe { tile_avx512(t) };
        return;
    }
    tile_portable(t);
}

#[inline(always)]
fn tile_portable(t: &mut [[f32; TILE]; TILE]) {
    swap::<1>(t);
    swap::<2>(t);
    swap::<4>(t);
    swap::<8>(t);
}

#[inline(always)]
fn swap<const D: usize>(t: &mut [[f32; TILE]; TILE]) {
    for i in 0..TILE {
        if i & D == 0 {
            let (a, b) = (t[i], t[i + D]);
            t[i] = std::array::from_fn(|j| if j & D == 0 { a[j] } else { b[j - D] });
            t[i + D] = std::array::from_fn(|j| if j & D == 0 { a[j + D] } else { b[j] });
        }
    }
}

/// The same rounds with the rows in registers; left to itself the compiler moves single elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn tile_avx512(t: &mut [[f32; TILE]; TILE]) {
    use std::arch::x86_64::{
        __m512, _mm512_loadu_epi32, _mm512_loadu_ps, _mm512_permutex2var_ps, _mm512_storeu_ps,
    };
    /// Lanes of the two results of one swap, counted through both operands.
    const fn lanes(distance: usize) -> [[i32; TILE]; 2] {
        let mut lanes = [[0; TILE]; 2];
        let mut j = 0;
        while j < TILE {
            let upper = j & distance != 0;
            lanes[0][j] = if upper { TILE + j - distance } else { j } as i32;
            lanes[1][j] = if upper { TILE + j } else { j + distance } as i32;
            j += 1;
        }
        lanes
    }
    const LANES: [[[i32; TILE]; 2]; 4] = [lanes(1), lanes(2), lanes(4), lanes(8)];
    // SAFETY: reads of 16 floats from arrays of 16 floats.
    let mut rows: [__m512; TILE] =
        std::array::from_fn(|i| unsafe { _mm512_loadu_ps(t[i].as_ptr()) });
    for (round, [low, high]) in LANES.iter().enumerate() {
        let distance = 1 << round;
        // SAFETY: reads of 16 words from arrays of 16 words.
        let (low, high) = unsafe {
            (
                _mm512_loadu_epi32(low.as_ptr()),
                _mm512_loadu_epi32(high.as_ptr()),
            )
        };
        for i in (0..TILE).filter(|i| i & distance == 0) {
            let (a, b) = (rows[i], rows[i + distance]);
            rows[i] = _mm512_permutex2var_ps(a, low, b);
            rows[i + distance] = _mm512_permutex2var_ps(a, high, b);
        }
    }
    for (to, row) in t.iter_mut().zip(rows) {
        // SAFETY: a write of 16 floats to an array of 16 floats.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), row) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_transposing_a_tile_agree() {
        let source: [[f32; TILE]; TILE] =
            std::array::from_fn(|i| std::array::from_fn(|j| (i * TILE + j) as f32));
        let want = std::array::from_fn(|i| std::array::from_fn(|j| source[j][i]));
        for way in [tile, tile_portable] {
            let mut t = source;
            way(&mut t);
            assert_eq!(t, want);
        }
    }
}
