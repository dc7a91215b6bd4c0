use super::INVERSE_127_SQUARED;
use crate::dequantise::{INVERSE_127, Int8, Int8Parts};
use crate::row_blocks::{blocks, rows_per_block, typed, typed_mut};
use crate::{Element, Rows, View, ViewMut};
use half::f16;
use rayon::prelude::*;

/// Writes codes and scales; returns the columns that are left out, found in the first `used` rows.
pub(super) fn quantise<X: Element, C: Element>(
    x: Rows<'_, X>,
    threshold: f32,
    used: usize,
    codes: ViewMut<'_>,
    scales: ViewMut<'_>,
) -> Vec<u32> {
    let mut flags = vec![false; x.cols()];
    if threshold > 0.0 {
        for row in 0..used {
            for (flag, value) in flags.iter_mut().zip(x.row(row)) {
                *flag |= rounded(*value).abs() >= threshold;
            }
        }
    }
    // Nothing is at least NaN.
    let limit = if threshold > 0.0 { threshold } else { f32::NAN };
    let (mut codes, mut scales) = (typed_mut::<C>(codes), typed_mut::<f32>(scales));
    let step = rows_per_block(codes.cols());
    let pitch = scales.pitch();
    let scales = scales.data_mut().par_chunks_mut(step * pitch);
    blocks(&mut codes)
        .zip(scales)
        .enumerate()
        .for_each(|(block, (mut codes, scales))| {
            let scales = scales.iter_mut().step_by(pitch);
            for ((row, codes), scale) in (block * step..).zip(codes.rows()).zip(scales) {
                *scale = quantise_row(x.row(row), limit, &flags, codes);
            }
        });
    let found = (0_u32..).zip(&flags).filter(|(_, flag)| **flag);
    found.map(|(column, _)| column).collect()
}

/// One row; its scale is NaN where a value is.
fn quantise_row<X: Element, C: Element>(
    x: &[X],
    limit: f32,
    flags: &[bool],
    codes: &mut [C],
) -> f32 {
    let inside = |value: X| {
        let value = rounded(value);
        let outside = value.abs() >= limit;
        (!outside).then_some(value)
    };
    let kept = x.iter().filter_map(|value| inside(*value));
    let scale = kept.fold(0.0_f32, |most, value| {
        if most.is_nan() || value.abs() <= most {
            most
        } else {
            value.abs()
        }
    });
    // Two roundings, as `127.0 / tensor` has in PyTorch.
    let factor = scale.recip() * 127.0;
    for ((code, value), flag) in codes.iter_mut().zip(x).zip(flags) {
        let value = inside(*value).filter(|_| !flag && scale > 0.0 && scale.is_finite());
        *code = C::from_f32(value.map_or(0.0, |value| (value * factor).round_ties_even()));
    }
    scale
}

fn rounded<X: Element>(value: X) -> f32 {
    f16::from_f32(value.to_f32()).to_f32()
}

/// `y = sums * s S / 127^2 + sum_o x W`, with the sums in `y` itself where there are no others.
pub(super) fn finish<X: Element, Y: Element>(
    x: Rows<'_, X>,
    weight: &Int8,
    scales: View<'_>,
    outliers: &[u32],
    sums: Option<View<'_>>,
    y: ViewMut<'_>,
) {
    let Int8Parts::Host { codes, absmax } = weight.parts() else {
        unreachable!("devices were compared");
    };
    let (scales, sums) = (typed::<f32>(scales), sums.map(typed::<f32>));
    let (cols, mut y) = (x.cols(), typed_mut::<Y>(y));
    let step = rows_per_block(y.cols());
    // What a code stands for, in the dtype of the input.
    let value = |row: usize, column: u32| {
        let code = f32::from(codes[row * cols + column as usize]);
        X::from_f32(code * absmax[row] * INVERSE_127).to_f32()
    };
    blocks(&mut y).enumerate().for_each(|(block, mut y)| {
        for (t, y) in (block * step..).zip(y.rows()) {
            let (x, scale) = (x.row(t), scales.row(t)[0]);
            for (r, y) in y.iter_mut().enumerate() {
                let sum = sums
                    .as_ref()
                    .map_or_else(|| y.to_f32(), |sums| sums.row(t)[r]);
                let product = sum * (scale * absmax[r]) * INVERSE_127_SQUARED;
                let kept = outliers
                    .iter()
                    .map(|&o| x[o as usize].to_f32() * value(r, o));
                *y = Y::from_f32(product + kept.sum::<f32>());
            }
        }
    });
}
