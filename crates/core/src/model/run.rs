//! What one pass over a micro-batch carries besides activations.

use super::rope::RopeConfig;
use crate::adapter::LowRank;
use crate::data::PackedBatch;
use crate::params::FlatBuffer;
use ferrotune_kernels::{DType, Indices, Tensor, Workspace, dropout, rng};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Rows of the angle tables that one task fills.
const ANGLE_ROWS: usize = 64;

/// Whether random draws happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No dropout.
    Eval,
    /// Dropout with masks drawn from `(seed, step, site, document, position, column)`.
    Train {
        /// Seed of the run.
        seed: u64,
        /// Optimizer step, from 0.
        step: u64,
    },
}

/// The surroundings of a forward and its backward.
pub(crate) struct Run<'a> {
    pub(crate) params: &'a FlatBuffer,
    pub(crate) workspace: &'a Workspace,
    /// Dtype of activations.
    pub(crate) dtype: DType,
    pub(crate) tokens: usize,
    pub(crate) ids: Indices<'a>,
    pub(crate) cu_seqlens: Indices<'a>,
    /// cos and sin per token, `[T, rotary_dim / 2]`.
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
    mode: Mode,
    /// Document and position of each token, side by side: the counter of its draws.
    draw_rows: Indices<'a>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        params: &'a FlatBuffer,
        workspace: &'a Workspace,
        dtype: DType,
        rope: &RopeConfig,
        batch: &'a PackedBatch,
        mode: Mode,
    ) -> Self {
        let (cos, sin) = angles(rope, batch);
        let mut draw_rows = Vec::new();
        if mode != Mode::Eval {
            for (s, bounds) in batch.cu_seqlens.windows(2).enumerate() {
                let id = batch.sequence_ids[s] as u32;
                draw_rows.extend((0..bounds[1] - bounds[0]).flat_map(|position| [id, position]));
            }
        }
        let (device, tokens) = (workspace.device(), batch.tokens());
        let table = |values| {
            let table = Tensor::from_f32(values, tokens, rope.rotary_dim / 2);
            if device.is_cuda() {
                table.to_device(device)
            } else {
                table
            }
        };
        Self {
            params,
            workspace,
            dtype,
            tokens,
            ids: Indices::new(&batch.input_ids[..], device),
            cu_seqlens: Indices::new(&batch.cu_seqlens[..], device),
            cos: table(cos),
            sin: table(sin),
            mode,
            draw_rows: Indices::new(draw_rows, device),
        }
    }

    /// The mask of a low-rank update's dropout at site `site`, if one applies.
    pub(crate) fn dropout(
        &self,
        site: usize,
        low_rank: &LowRank,
    ) -> Option<(dropout::Key, &Indices<'a>)> {
        match self.mode {
            Mode::Train { seed, step } if low_rank.dropout > 0.0 => {
                let seed = rng::mix(rng::mix(rng::key_for(seed, "dropout"), step), site as u64);
                Some((
                    dropout::Key {
                        seed,
                        p: low_rank.dropout,
                    },
                    &self.draw_rows,
                ))
            }
            _ => None,
        }
    }
}

/// cos and sin of every token, in the order Transformers computes them: f32 frequency times f32
/// position, rounded, then the function.
fn angles(rope: &RopeConfig, batch: &PackedBatch) -> (Vec<f32>, Vec<f32>) {
    let half = rope.rotary_dim / 2;
    let scale = rope.attention_factor() as f32;
    let mut by_length = BTreeMap::new();
    let mut cos = vec![0.0; batch.tokens() * half];
    let mut sin = vec![0.0; batch.tokens() * half];
    for (s, bounds) in batch.cu_seqlens.windows(2).enumerate() {
        let length = if rope.depends_on_length() {
            batch.rope_lengths[s]
        } else {
            0
        };
        let frequencies = by_length
            .entry(length)
            .or_insert_with(|| rope.inverse_frequencies(length));
        let rows = bounds[0] as usize..bounds[1] as usize;
        let elements = rows.start * half..rows.end * half;
        let positions = batch.position_ids[rows].par_chunks(ANGLE_ROWS);
        let cos = cos[elements.clone()].par_chunks_mut(ANGLE_ROWS * half);
        let sin = sin[elements].par_chunks_mut(ANGLE_ROWS * half);
        (positions, cos, sin)
            .into_par_iter()
            .for_each(|(positions, cos, sin)| {
                let rows = cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half));
                for (&position, (cos, sin)) in positions.iter().zip(rows) {
                    for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies.iter()) {
                        let angle = frequency * position as f32;
                        *cos = angle.cos() * scale;
                        *sin = angle.sin() * scale;
                    }
                }
            });
    }
    (cos, sin)
}

/// Runs `body` on a worker thread: from outside, each parallel loop would hand its work over to one
/// and sleep until it is done, two switches of thread per operation.
pub(crate) fn on_worker<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| body())
}
