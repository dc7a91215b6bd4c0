use crate::rng::philox4x32;
use crate::row_blocks::{blocks, rows_per_block};
use crate::{Element, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator};

/// 2^-31: from a word to `[0, 2]`.
const UNIT: f32 = 1.0 / 2_147_483_648.0;

pub(super) fn add<X: Element>(mut x: RowsMut<'_, X>, key: [u32; 2], rows: &[u32], scales: &[u32]) {
    let step = rows.last().copied().unwrap_or(0);
    let height = rows_per_block(x.cols());
    blocks(&mut x).enumerate().for_each(|(block, mut x)| {
        for (t, x) in (block * height..).zip(x.rows()) {
            let (sequence, position) = (rows[2 * t], rows[2 * t + 1]);
            let scale = f32::from_bits(scales[t]);
            if scale == 0.0 {
                continue;
            }
            for (counter, x) in (0..).zip(x.chunks_mut(4)) {
                let words = philox4x32([counter, position, sequence, step], key);
                for (x, word) in x.iter_mut().zip(words) {
                    let uniform = word as f32 * UNIT - 1.0;
                    *x = X::from_f32(x.to_f32() + uniform * scale);
                }
            }
        }
    });
}
