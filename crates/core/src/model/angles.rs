//! cos and sin of positions.

use super::rope::RopeConfig;
use crate::data::PackedBatch;
use ferrotune_kernels::{Device, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows of the tables that one task fills.
const ROWS: usize = 64;

/// cos and sin, each `[rows, rotary_dim / 2]`.
#[derive(Debug)]
pub(crate) struct Angles {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
}

/// The angles of every position up to the last that was asked for, of each rope: they are made once,
/// not for every micro-batch.
///
/// All positions of the first set of frequencies come first, then those of the next ([`variants`]).
#[derive(Debug, Default)]
pub(crate) struct AngleTable {
    made: Mutex<Arc<Vec<Angles>>>,
}

/// The largest number of sets of frequencies that one of `ropes` has.
pub(crate) fn variants(ropes: &[RopeConfig]) -> usize {
    let each = ropes.iter().map(|rope| rope.variants().len());
    each.max().unwrap_or(1)
}

impl AngleTable {
    /// Tables of at least `positions` rows for each set of frequencies, on `device`.
    pub(crate) fn up_to(
        &self,
        ropes: &[RopeConfig],
        device: &Device,
        positions: usize,
    ) -> Arc<Vec<Angles>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let (variants, rows) = (variants(ropes), positions.next_power_of_two());
        let is_missing = |table: &Angles| table.cos.rows() < variants * positions;
        if made.len() < ropes.len() || made.iter().any(is_missing) {
            let positions: Vec<u32> = (0..rows as u32).collect();
            let table = |rope: &RopeConfig| {
                let mut angles = Host::zeros(rope, variants * rows);
                let lengths = rope.variants();
                // One that has fewer sets than another repeats its last.
                let lengths = lengths.iter().chain(lengths.last().into_iter().cycle());
                for (variant, &length) in lengths.take(variants).enumerate() {
                    let frequencies = rope.inverse_frequencies(length);
                    angles.fill(rope, &frequencies, &positions, variant * rows);
                }
                angles.on(device)
            };
            *made = Arc::new(ropes.iter().map(table).collect());
        }
        Arc::clone(&made)
    }
}

/// The angles of every row of `batch`, where they depend on the lengths of documents.
pub(crate) fn by_row(ropes: &[RopeConfig], batch: &PackedBatch, device: &Device) -> Vec<Angles> {
    let table = |rope: &RopeConfig| {
        let mut by_length = BTreeMap::new();
        let mut angles = Host::zeros(rope, batch.rows());
        for (s, bounds) in batch.cu_seqlens.windows(2).enumerate() {
            let length = batch.rope_lengths[s];
            let frequencies = by_length
                .entry(length)
                .or_insert_with(|| rope.inverse_frequencies(length));
            let rows = bounds[0] as usize..bounds[1] as usize;
            let first = rows.start;
            angles.fill(rope, frequencies, &batch.position_ids[rows], first);
        }
        for (row, length) in batch.computed_padding() {
            let frequencies = by_length
                .entry(length)
                .or_insert_with(|| rope.inverse_frequencies(length));
            angles.fill(rope, frequencies, &batch.position_ids[row..=row], row);
        }
        angles.on(device)
    };
    ropes.iter().map(table).collect()
}

/// Tables in host memory.
struct Host {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Host {
    fn zeros(rope: &RopeConfig, rows: usize) -> Self {
        let half = rope.rotary_dim / 2;
        Self {
            cos: vec![0.0; rows * half],
            sin: vec![0.0; rows * half],
            half,
        }
    }

    /// Rows from `first` on, in the order Transformers computes them: f32 frequency times f32 position,
    /// rounded, then the function.
    fn fill(&mut self, rope: &RopeConfig, frequencies: &[f32], positions: &[u32], first: usize) {
        let (half, scale) = (self.half, rope.attention_factor() as f32);
        let elements = first * half..(first + positions.len()) * half;
        let positions = positions.par_chunks(ROWS);
        let cos = self.cos[elements.clone()].par_chunks_mut(ROWS * half);
        let sin = self.sin[elements].par_chunks_mut(ROWS * half);
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

    fn on(self, device: &Device) -> Angles {
        let table = |values: Vec<f32>| {
            let rows = values.len().checked_div(self.half).unwrap_or(0);
            let table = Tensor::from_f32(values, rows, self.half);
            match device {
                Device::Cpu => table,
                Device::Cuda(_) => table.to_device(device),
            }
        };
        Angles {
            cos: table(self.cos),
            sin: table(self.sin),
        }
    }
}
