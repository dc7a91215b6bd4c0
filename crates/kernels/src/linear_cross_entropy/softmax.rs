//! Softmax over the rows of a matrix `[V, N]`: every column is one prediction, one vector lane.

use super::Sums;
use crate::{View, ViewMut, simd};
use rayon::prelude::*;

/// Logits of one task: 256 KiB, which stays in L2 between its two passes.
const TASK_LOGITS: usize = 64 << 10;

/// What the loss needs to know of one column.
#[derive(Clone, Copy)]
pub(super) struct Lane {
    max: f32,
    argmax: u32,
    /// Sum of `exp(z - max)`.
    sum: f64,
    /// Sum of `exp(z - max) (z - max)`.
    weighted: f64,
}

impl Lane {
    /// Loss, accuracy and entropy of this prediction, whose target has the given logit.
    pub(super) fn sums(&self, logit: f32, target: u32) -> Sums {
        Sums {
            loss: f64::from(self.max) - f64::from(logit) + self.sum.ln(),
            count: 1,
            correct: u64::from(self.argmax == target),
            entropy: self.sum.ln() - self.weighted / self.sum,
        }
    }

    /// Adds the rows behind `block`, which come later: the first of equal maxima wins.
    fn merge(&mut self, block: &Block, lane: usize) {
        let max = block.max[lane];
        if max > self.max {
            self.rescale(max);
            self.argmax = block.argmax[lane];
        }
        let shift = f64::from(max - self.max);
        let (sum, weighted) = (f64::from(block.sum[lane]), f64::from(block.weighted[lane]));
        self.sum += sum * shift.exp();
        self.weighted += sum.mul_add(shift, weighted) * shift.exp();
    }

    fn rescale(&mut self, max: f32) {
        if self.sum != 0.0 {
            let shift = f64::from(self.max - max);
            self.weighted = self.sum.mul_add(shift, self.weighted) * shift.exp();
            self.sum *= shift.exp();
        }
        self.max = max;
    }
}

/// The same for some rows of the matrix, each field `[N]`.
struct Block {
    max: Vec<f32>,
    argmax: Vec<u32>,
    sum: Vec<f32>,
    weighted: Vec<f32>,
}

/// The statistics of every column of `logits [V, N]`, f32 and without gaps.
pub(super) fn statistics(logits: View<'_>) -> Vec<Lane> {
    let lanes = logits.cols();
    let blocks: Vec<Block> = values(logits)
        .par_chunks(rows_per_task(lanes) * lanes)
        .enumerate()
        .map(|(task, rows)| {
            let first = (task * rows_per_task(lanes)) as u32;
            simd::dispatch(
                #[inline(always)]
                || block_statistics(rows, lanes, first),
            )
        })
        .collect();
    let empty = Lane {
        max: f32::NEG_INFINITY,
        argmax: 0,
        sum: 0.0,
        weighted: 0.0,
    };
    let merged = |lane| {
        blocks.iter().fold(empty, |mut all, block| {
            all.merge(block, lane);
            all
        })
    };
    (0..lanes).map(merged).collect()
}

/// The mean of every column of `logits [V, N]`, f32 and without gaps.
pub(super) fn means(logits: View<'_>) -> Vec<f64> {
    let lanes = logits.cols();
    let blocks: Vec<Vec<f32>> = values(logits)
        .par_chunks(rows_per_task(lanes) * lanes)
        .map(|rows| {
            let mut sums = vec![0.0; lanes];
            for row in rows.chunks_exact(lanes) {
                for (sum, z) in sums.iter_mut().zip(row) {
                    *sum += z;
                }
            }
            sums
        })
        .collect();
    let mean = |lane: usize| {
        let sum: f64 = blocks.iter().map(|block| f64::from(block[lane])).sum();
        sum / logits.rows() as f64
    };
    (0..lanes).map(mean).collect()
}

/// Overwrites `logits [V, N]` by the gradient of the sum of losses: `softmax - q`, where q is one hot
/// but for label smoothing.
pub(super) fn to_gradients(logits: ViewMut<'_>, lanes: &[Lane], targets: &[u32], smoothing: f32) {
    let width = lanes.len();
    let everywhere = smoothing / logits.rows() as f32;
    let max: Vec<f32> = lanes.iter().map(|lane| lane.max).collect();
    let factor: Vec<f32> = lanes.iter().map(|lane| lane.sum.recip() as f32).collect();
    let Some(mut logits) = logits.typed::<f32>() else {
        unreachable!("the chunk of logits is f32");
    };
    let chunks = logits
        .data_mut()
        .par_chunks_mut(rows_per_task(width) * width);
    chunks.for_each(|rows| {
        simd::dispatch(
            #[inline(always)]
            || {
                for row in rows.chunks_exact_mut(width) {
                    for ((z, max), factor) in row.iter_mut().zip(&max).zip(&factor) {
                        *z = simd::exp(*z - max).mul_add(*factor, -everywhere);
                    }
                }
            },
        );
    });
    for (lane, &target) in targets.iter().enumerate() {
        logits.row_mut(target as usize)[lane] -= 1.0 - smoothing;
    }
}

fn rows_per_task(lanes: usize) -> usize {
    (TASK_LOGITS / lanes).max(1)
}

fn values(logits: View<'_>) -> &[f32] {
    let Some(rows) = logits.typed::<f32>() else {
        unreachable!("the chunk of logits is f32");
    };
    rows.data()
}

#[inline(always)]
fn block_statistics(rows: &[f32], lanes: usize, first: u32) -> Block {
    let mut block = Block {
        max: vec![f32::NEG_INFINITY; lanes],
        argmax: vec![first; lanes],
        sum: vec![0.0; lanes],
        weighted: vec![0.0; lanes],
    };
    for (row, v) in rows.chunks_exact(lanes).zip(first..) {
        for ((&z, max), argmax) in row.iter().zip(&mut block.max).zip(&mut block.argmax) {
            let larger = z > *max;
            *argmax = if larger { v } else { *argmax };
            *max = if larger { z } else { *max };
        }
    }
    for row in rows.chunks_exact(lanes) {
        let sums = block.sum.iter_mut().zip(&mut block.weighted);
        for ((&z, &max), (sum, weighted)) in row.iter().zip(&block.max).zip(sums) {
            let e = simd::exp(z - max);
            *sum += e;
            *weighted = e.mul_add(z - max, *weighted);
        }
    }
    block
}
