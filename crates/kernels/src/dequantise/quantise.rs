//! Nearest codes.

use crate::{Error, Result};
use rayon::prelude::*;

/// The code nearest to a value.
#[derive(Clone, Debug)]
pub(crate) struct NearestCode {
    /// Codes in ascending order of what they stand for.
    pub(crate) order: Vec<u8>,
    /// Halfway from each to the next.
    pub(crate) limits: Vec<f32>,
}

impl NearestCode {
    /// `code[q]` is what `q` stands for; 256 of them at most.
    pub(crate) fn new(code: &[f32]) -> Self {
        let mut order: Vec<u8> = (0..=u8::MAX).take(code.len()).collect();
        let value = |q: u8| code[usize::from(q)];
        order.sort_by(|&a, &b| f32::total_cmp(&value(a), &value(b)));
        let limits = order
            .windows(2)
            .map(|pair| (value(pair[0]) + value(pair[1])) * 0.5)
            .collect();
        Self { order, limits }
    }

    pub(super) fn of(&self, value: f32) -> u8 {
        self.order[self.place(value)]
    }

    /// Where the code for `value` is among all in ascending order.
    pub(super) fn place(&self, value: f32) -> usize {
        self.limits.partition_point(|&limit| value > limit)
    }

    /// [`NearestCode::of`], whose place is `start` or after it.
    pub(super) fn of_from(&self, value: f32, start: usize) -> u8 {
        let limits = self.limits[start..].iter();
        let further = limits.take_while(|&&limit| value > limit).count();
        self.order[start + further]
    }
}

/// Refuses infinities and NaN, which have no scale.
pub(super) fn check_finite(op: &'static str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::Invalid {
            op,
            message: format!("value {at} is {}, which has no code", values[at]),
        }),
    }
}

/// Codes of all values, and the largest magnitude of every block. All of a block of zeros get `zero`.
pub(super) fn blockwise(
    values: &[f32],
    block: usize,
    nearest: &NearestCode,
    zero: u8,
) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; values.len()];
    let absmax = codes
        .par_chunks_mut(block)
        .zip(values.par_chunks(block))
        .map(|(codes, values)| one_block(values, codes, zero, |value| nearest.of(value)))
        .collect();
    (codes, absmax)
}

/// Codes of the values of a block over their largest magnitude, which is returned. All of zeros get `zero`.
pub(super) fn one_block(
    values: &[f32],
    codes: &mut [u8],
    zero: u8,
    code_of: impl Fn(f32) -> u8,
) -> f32 {
    let absmax = largest(values);
    if absmax == 0.0 {
        codes.fill(zero);
        return absmax;
    }
    let scale = absmax.recip();
    for (code, value) in codes.iter_mut().zip(values) {
        // Zero times the reciprocal of a scale that has none must stay zero.
        let scaled = if *value == 0.0 { 0.0 } else { value * scale };
        *code = code_of(scaled.clamp(-1.0, 1.0));
    }
    absmax
}

/// [`blockwise`], with two codes in a byte; an odd last one is followed by the code of zero.
pub(super) fn four_bit(values: &[f32], block: usize, nearest: &NearestCode) -> (Vec<u8>, Vec<f32>) {
    let zero = nearest.of(0.0);
    let (codes, absmax) = blockwise(values, block, nearest, zero);
    let pairs = codes.par_chunks(2);
    let packed = pairs.map(|pair| pair[0] << 4 | pair.get(1).unwrap_or(&zero));
    (packed.collect(), absmax)
}

/// Rows scaled to -127..=127, and the largest magnitude of each.
pub(super) fn rowwise(values: &[f32], [rows, cols]: [usize; 2]) -> (Vec<i8>, Vec<f32>) {
    if cols == 0 {
        return (Vec::new(), vec![0.0; rows]);
    }
    let absmax: Vec<f32> = values.par_chunks(cols).map(largest).collect();
    let mut quantised = vec![0; values.len()];
    quantised
        .par_chunks_mut(cols)
        .zip(values.par_chunks(cols))
        .zip(&absmax)
        .for_each(|((quantised, values), absmax)| {
            // Two roundings, as `127.0 / tensor` has in PyTorch. A row of zeros stays zero: the cast
            // turns NaN into 0.
            let scale = absmax.recip() * 127.0;
            for (to, value) in quantised.iter_mut().zip(values) {
                *to = (value * scale).round_ties_even() as i8;
            }
        });
    (quantised, absmax)
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, v| v.abs().max(largest))
}
