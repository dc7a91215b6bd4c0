use super::Key;
use crate::row_blocks::{blocks, rows_per_block};
use crate::simd::dispatch;
use crate::{Element, Rows, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator};

/// Philox counters computed side by side, and the columns they decide.
const COUNTERS: usize = 16;
const COLUMNS: usize = 4 * COUNTERS;

/// A [`Key`] in the form the loops use.
#[derive(Clone, Copy)]
pub(super) enum Mask {
    /// p = 0 and p = 1 (where 1 / (1 - p) is infinite) need no random numbers.
    Constant(f32),
    /// Keep an element whose word is at least `threshold`, and multiply it by `scale`.
    Random {
        key: [u32; 2],
        threshold: u32,
        scale: f32,
    },
}

impl Mask {
    pub(super) fn new(Key { seed, p }: Key) -> Self {
        let p = f64::from(p);
        // Exact below p = 1: an f32 has 24 bits, so p * 2^32 is at most 2^32 - 2^8.
        match (p * 4_294_967_296.0).round() {
            _ if p >= 1.0 => Self::Constant(0.0),
            0.0 => Self::Constant(1.0),
            threshold => Self::Random {
                key: [seed as u32, (seed >> 32) as u32],
                threshold: threshold as u32,
                scale: (1.0 / (1.0 - p)) as f32,
            },
        }
    }

    /// The factors of [`COLUMNS`] columns of a row, starting with those of `counter`.
    #[inline(always)]
    fn factors(self, counter: u32, token: [u32; 2], step: u32) -> [f32; COLUMNS] {
        match self {
            Self::Constant(factor) => [factor; COLUMNS],
            Self::Random {
                key,
                threshold,
                scale,
            } => {
                let words = philox(counter, token, step, key);
                std::array::from_fn(|c| {
                    let kept = words[c % 4][c / 4] >= threshold;
                    if kept { scale } else { 0.0 }
                })
            }
        }
    }
}

/// What the words of a row are drawn for.
#[derive(Clone, Copy)]
pub(super) struct Draws<'a> {
    /// Sequence and position of every row.
    pub(super) tokens: &'a [[u32; 2]],
    pub(super) step: u32,
}

/// `out = combine(out, x * factor)`.
pub(super) fn apply<X: Element, Y: Element>(
    x: Rows<'_, X>,
    mask: Mask,
    draws: Draws<'_>,
    mut out: RowsMut<'_, Y>,
    combine: impl Fn(f32, f32) -> f32 + Copy + Send + Sync,
) {
    let step = rows_per_block(out.cols());
    blocks(&mut out).enumerate().for_each(|(block, mut out)| {
        dispatch(
            #[inline(always)]
            || {
                for (t, out) in (block * step..).zip(out.rows()) {
                    let columns = out.chunks_mut(COLUMNS).zip(x.row(t).chunks(COLUMNS));
                    for (counter, (out, x)) in (0..).step_by(COUNTERS).zip(columns) {
                        let factors = mask.factors(counter, draws.tokens[t], draws.step);
                        for ((out, x), factor) in out.iter_mut().zip(x).zip(factors) {
                            *out = Y::from_f32(combine(out.to_f32(), x.to_f32() * factor));
                        }
                    }
                }
            },
        );
    });
}

/// [`crate::rng::philox4x32`] of `[counter + lane, position, sequence, step]` for every lane, with the
/// lanes innermost so that each round vectorises: word `w` of lane `l` is `[w][l]`.
#[inline(always)]
fn philox(
    counter: u32,
    [sequence, position]: [u32; 2],
    step: u32,
    mut key: [u32; 2],
) -> [[u32; COUNTERS]; 4] {
    let mut words = [
        std::array::from_fn(|lane| counter.wrapping_add(lane as u32)),
        [position; COUNTERS],
        [sequence; COUNTERS],
        [step; COUNTERS],
    ];
    for _ in 0..10 {
        let [w0, w1, w2, w3] = &mut words;
        for lane in 0..COUNTERS {
            let p0 = u64::from(w0[lane]) * 0xd251_1f53;
            let p1 = u64::from(w2[lane]) * 0xcd9e_8d57;
            w0[lane] = (p1 >> 32) as u32 ^ w1[lane] ^ key[0];
            w1[lane] = p1 as u32;
            w2[lane] = (p0 >> 32) as u32 ^ w3[lane] ^ key[1];
            w3[lane] = p0 as u32;
        }
        key = [
            key[0].wrapping_add(0x9e37_79b9),
            key[1].wrapping_add(0xbb67_ae85),
        ];
    }
    words
}
