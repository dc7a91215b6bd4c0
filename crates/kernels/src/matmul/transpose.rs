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
    let whole = cols / TILE * TILE;
    for c in (0..whole).step_by(TILE) {
        let block = &mut dst[c * pitch..];
        let mut r = 0;
        while r + TILE <= rows {
            tile(
                std::array::from_fn(|i| widen(&source(r + i)[c..])),
                |i, values| {
                    block[i * pitch + r..][..TILE].copy_from_slice(&values);
                },
            );
            r += TILE;
        }
        for r in r..rows {
            for (i, value) in source(r)[c..c + TILE].iter().enumerate() {
                block[i * pitch + r] = value.to_f32();
            }
        }
    }
    for r in 0..rows {
        for (i, value) in source(r)[whole..cols].iter().enumerate() {
            dst[(whole + i) * pitch + r] = value.to_f32();
        }
    }
}

#[inline(always)]
fn widen<T: Element>(values: &[T]) -> [f32; TILE] {
    let values = &values[..TILE];
    std::array::from_fn(|i| values[i].to_f32())
}

/// Transposes a 16 x 16 tile in registers: four rounds, each swapping the blocks off the diagonal
/// at distance 1, 2, 4 and 8.
#[inline(always)]
fn tile(mut t: [[f32; TILE]; TILE], mut store: impl FnMut(usize, [f32; TILE])) {
    swap::<1>(&mut t);
    swap::<2>(&mut t);
    swap::<4>(&mut t);
    swap::<8>(&mut t);
    for (i, row) in t.into_iter().enumerate() {
        store(i, row);
    }
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
