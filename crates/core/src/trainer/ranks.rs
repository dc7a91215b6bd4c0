//! What ranks exchange: the gradients and sums of a step, state at the start, checksums in between.

use crate::data::PackedBatch;
use crate::params::FlatBuffer;
use crate::process_group::ProcessGroup;
use crate::{Error, Result};
use ferrotune_kernels::linear_cross_entropy::Sums;
use std::ops::AddAssign;

/// The sums of a step as ranks exchange them. Counts stay exact: they are far below 2^53.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Totals {
    pub(super) sums: Sums,
    /// Tokens, prompts included.
    pub(super) tokens: u64,
    /// Documents.
    pub(super) sequences: u64,
}

/// f64 values of [`Totals`].
const TOTALS: usize = 6;

impl Totals {
    /// Of `micro_batches`, whose losses add up to `sums`.
    pub(super) fn of(sums: Sums, micro_batches: &[PackedBatch]) -> Self {
        let count = |of: fn(&PackedBatch) -> usize| micro_batches.iter().map(of).sum::<usize>();
        Self {
            sums,
            tokens: count(PackedBatch::tokens) as u64,
            sequences: count(PackedBatch::sequences) as u64,
        }
    }

    fn to_array(self) -> [f64; TOTALS] {
        let Sums {
            loss,
            entropy,
            count,
            correct,
        } = self.sums;
        let counts = [count, correct, self.tokens, self.sequences].map(|count| count as f64);
        [loss, entropy, counts[0], counts[1], counts[2], counts[3]]
    }

    fn from_array([loss, entropy, count, correct, tokens, sequences]: [f64; TOTALS]) -> Self {
        Self {
            sums: Sums {
                loss,
                entropy,
                count: count as u64,
                correct: correct as u64,
            },
            tokens: tokens as u64,
            sequences: sequences as u64,
        }
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.sums += other.sums;
        self.tokens += other.tokens;
        self.sequences += other.sequences;
    }
}

/// Sums gradients and totals over all ranks, in the group's own order.
pub(super) fn all_reduce(
    group: &mut dyn ProcessGroup,
    grads: &mut FlatBuffer,
    totals: Totals,
) -> Result<Totals> {
    let mut array = totals.to_array();
    group.all_reduce(grads, &mut array)?;
    Ok(Totals::from_array(array))
}

/// Sums totals alone over all ranks.
pub(super) fn sum_totals(group: &mut dyn ProcessGroup, totals: Totals) -> Result<Totals> {
    let mut array = totals.to_array();
    group.sum_totals(&mut array)?;
    Ok(Totals::from_array(array))
}

/// The gradient of one micro-batch, for sums in global order.
pub(super) struct MicroGradient {
    /// Id of its first document in the optimizer step: grows with its place in the global list.
    pub(super) first_sequence_id: u64,
    pub(super) totals: Totals,
    pub(super) gradient: Vec<f32>,
}

impl MicroGradient {
    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.first_sequence_id.to_le_bytes());
        bytes.extend_from_slice(bytemuck::cast_slice(&self.totals.to_array()));
        bytes.extend_from_slice(bytemuck::cast_slice(&self.gradient));
    }

    /// `bytes` as [`MicroGradient::write`] made them, of a gradient of `len` values.
    fn read(bytes: &[u8], len: usize) -> Self {
        let (id, rest) = bytes.split_at(size_of::<u64>());
        let (totals, gradient) = rest.split_at(TOTALS * size_of::<f64>());
        debug_assert_eq!(gradient.len(), len * size_of::<f32>());
        Self {
            first_sequence_id: bytemuck::pod_read_unaligned(id),
            totals: Totals::from_array(bytemuck::pod_read_unaligned(totals)),
            gradient: bytemuck::pod_collect_to_vec(gradient),
        }
    }

    fn bytes(len: usize) -> usize {
        size_of::<u64>() + TOTALS * size_of::<f64>() + len * size_of::<f32>()
    }
}

/// Sums the gradients of a step's micro-batches in their global order, whatever rank computed which:
/// the same bits for any number of ranks.
///
/// Every rank receives every gradient: a step moves, and holds, one gradient per micro-batch of the whole
/// step instead of one.
pub(super) fn sum_in_order(
    group: &mut dyn ProcessGroup,
    mine: &[MicroGradient],
    grads: &mut FlatBuffer,
) -> Result<Totals> {
    let len = grads.layout().len();
    let mut bytes = Vec::with_capacity(mine.len() * MicroGradient::bytes(len));
    mine.iter().for_each(|m| m.write(&mut bytes));
    let everyone = group.all_gather(&bytes)?;
    let size = MicroGradient::bytes(len);
    if let Some(rank) = everyone.iter().position(|b| b.len() % size != 0) {
        let message = format!(
            "rank {rank} trains other parameters than this one; it sent a gradient of another size"
        );
        return Err(Error::Transient { message });
    }
    let mut all: Vec<MicroGradient> = everyone
        .iter()
        .flat_map(|bytes| bytes.chunks_exact(size))
        .map(|bytes| MicroGradient::read(bytes, len))
        .collect();
    all.sort_by_key(|m| m.first_sequence_id);
    grads.zero();
    let mut totals = Totals::default();
    for part in &all {
        totals += part.totals;
        let sum = grads.as_mut_slice().iter_mut();
        sum.zip(&part.gradient).for_each(|(sum, g)| *sum += g);
    }
    Ok(totals)
}

/// Compares the bits of `params` with every peer's.
///
/// # Errors
/// [`Error::Transient`] naming the ranks that differ: they computed something else from the same
/// gradients, so memory or a wire is failing.
pub(super) fn check_replicas(
    group: &mut dyn ProcessGroup,
    params: &FlatBuffer,
    step: u64,
) -> Result<()> {
    if group.world_size() == 1 {
        return Ok(());
    }
    let digest = blake3::hash(bytemuck::cast_slice(params.as_slice()));
    let all = group.all_gather(digest.as_bytes())?;
    let differ: Vec<String> = (1..all.len())
        .filter(|&rank| all[rank] != all[0])
        .map(|rank| rank.to_string())
        .collect();
    if differ.is_empty() {
        return Ok(());
    }
    let message = format!(
        "after step {step} the parameters of rank {} differ from rank 0's, though all applied the same gradients: \
         memory or a link is failing on one of them. Go on from the last checkpoint, on other nodes",
        differ.join(", ")
    );
    Err(Error::Transient { message })
}
