use super::four_bit::Packed;
use super::int8::Scaled;
use crate::row_blocks::{blocks, rows_per_block, typed_mut};
use crate::tensor::with_dtype;
use crate::{Element, RowsMut, ViewMut};
use rayon::prelude::*;

/// `q * absmax / 127` is computed with this reciprocal.
pub(crate) const INVERSE_127: f32 = 1.0 / 127.0;

pub(super) fn four_bit(packed: &Packed, block: usize, code: &[f32; 16], out: ViewMut<'_>) {
    let absmax = packed.absmax.values();
    with_dtype!(out.dtype(), T => {
        let mut out = typed_mut::<T>(out);
        each_row(&mut out, |row, mut values| {
            // Per block that the row touches: the 16 values there can be, then a look-up each.
            let mut at = row * values.len();
            while !values.is_empty() {
                let len = (block - at % block).min(values.len());
                let (part, rest) = values.split_at_mut(len);
                let scale = absmax[at / block];
                look_up(&packed.codes, at, &code.map(|c| T::from_f32(c * scale)), part);
                (at, values) = (at + len, rest);
            }
        });
    });
}

/// `values[i] = table[code at + i]`.
fn look_up<T: Element>(codes: &[u8], at: usize, table: &[T; 16], values: &mut [T]) {
    for (i, value) in (at..).zip(values) {
        let shift = if i % 2 == 0 { 4 } else { 0 };
        *value = table[usize::from(codes[i / 2] >> shift & 15)];
    }
}

/// The values, or without `scaled` the bytes.
pub(super) fn int8(matrix: &Scaled, scaled: bool, out: ViewMut<'_>) {
    with_dtype!(out.dtype(), T => {
        let mut out = typed_mut::<T>(out);
        each_row(&mut out, |row, values| {
            let (cols, scale) = (values.len(), matrix.absmax[row]);
            let bytes = &matrix.values[row * cols..(row + 1) * cols];
            for (to, &byte) in values.iter_mut().zip(bytes) {
                let byte = f32::from(byte);
                *to = T::from_f32(if scaled { byte * scale * INVERSE_127 } else { byte });
            }
        });
    });
}

fn each_row<T: Element>(out: &mut RowsMut<'_, T>, body: impl Fn(usize, &mut [T]) + Sync) {
    let per_block = rows_per_block(out.cols());
    blocks(out).enumerate().for_each(|(i, mut block)| {
        for (row, values) in (i * per_block..).zip(block.rows()) {
            body(row, values);
        }
    });
}
