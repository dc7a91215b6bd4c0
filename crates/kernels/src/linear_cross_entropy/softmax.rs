//! Softmax over the rows of a matrix `[V, N]`: every column is one prediction, one vector lane.

use super::Sums;
use crate::{RowsMut, View, ViewMut, simd};
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

/// Replaces `logits [V, N]`, f32 and without gaps, by `softcap * tanh(logit / softcap)`.
pub(super) fn cap(logits: ViewMut<'_>, softcap: f32) {
    let width = logits.cols();
    let mut logits = rows_mut(logits);
    let chunks = logits
        .data_mut()
        .par_chunks_mut(rows_per_task(width) * width);
    chunks.for_each(|logits| {
        for z in logits {
            *z = softcap * (*z / softcap).tanh();
        }
    });
}

/// What the gradient of the loss depends on beside the logits.
#[derive(Clone, Copy)]
pub(super) struct Loss<'a> {
    pub(super) targets: &'a [u32],
    pub(super) smoothing: f32,
    /// Of the logits, which are capped already.
    pub(super) softcap: Option<f32>,
}

impl Loss<'_> {
    /// The slope of the softcap where it gives `z`.
    #[inline(always)]
    fn slope(&self, z: f32) -> f32 {
        self.softcap.map_or(1.0, |softcap| {
            let tanh = z / softcap;
            1.0 - tanh * tanh
        })
    }
}

/// Overwrites `logits [V, N]` by the gradient of the sum of losses: `softmax - q`, where q is one hot
/// but for label smoothing, times the slope of the softcap.
pub(super) fn to_gradients(logits: ViewMut<'_>, lanes: &[Lane], loss: Loss<'_>) {
    let width = lanes.len();
    let everywhere = loss.smoothing / logits.rows() as f32;
    let max: Vec<f32> = lanes.iter().map(|lane| lane.max).collect();
    let factor: Vec<f32> = lanes.iter().map(|lane| lane.sum.recip() as f32).collect();
    let mut logits = rows_mut(logits);
    let logits = logits.data_mut();
    let place = |(lane, &target): (usize, &u32)| target as usize * width + lane;
    let targets: Vec<usize> = loss.targets.iter().enumerate().map(place).collect();
    // Before the gradients take the place of the logits.
    let hot: Vec<f32> = (targets.iter())
        .map(|&target| (1.0 - loss.smoothing) * loss.slope(logits[target]))
        .collect();
    let chunks = logits.par_chunks_mut(rows_per_task(width) * width);
    chunks.for_each(|rows| {
        simd::dispatch(
            #[inline(always)]
            || {
                for row in rows.chunks_exact_mut(width) {
                    for ((z, max), factor) in row.iter_mut().zip(&max).zip(&factor) {
                        // A factor of 1 where nothing is capped, known before the loop.
                        let slope = loss.slope(*z);
                        *z = simd::exp(*z - max).mul_add(*factor, -everywhere) * slope;
                    }
                }
            },
        );
    });
    for (target, hot) in targets.into_iter().zip(hot) {
        logits[target] -= hot;
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

fn rows_mut(logits: ViewMut<'_>) -> RowsMut<'_, f32> {
    let Some(rows) = logits.typed::<f32>() else {
        unreachable!("the chunk of logits is f32");
    };
    rows
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
