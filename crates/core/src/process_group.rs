//! The port that ranks implement: what a trainer needs of its peers.

use crate::Result;
use crate::params::FlatBuffer;
use std::fmt::Debug;
use std::ops::Range;

/// A process among its peers, known before they meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// This process, `0..world_size`. Rank 0 writes the files and speaks for all.
    pub rank: usize,
    /// Number of processes.
    pub world_size: usize,
    /// Which process of this machine: chooses its GPU.
    pub local_rank: usize,
    /// Number of processes on this machine, which share its memory and cores.
    pub local_world_size: usize,
}

impl Place {
    /// A process on its own.
    pub const SOLO: Self = Self {
        rank: 0,
        world_size: 1,
        local_rank: 0,
        local_world_size: 1,
    };

    /// Whether this is rank 0.
    #[must_use]
    pub fn is_first(self) -> bool {
        self.rank == 0
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::SOLO
    }
}

/// A group of processes (or threads) that train one model together.
///
/// Every rank makes the same calls in the same order. After an error the group is unusable.
pub trait ProcessGroup: Debug + Send {
    /// This process, `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn world_size(&self) -> usize;

    /// Announces that this rank is about to begin optimizer step `step` (from 0), and whether it has been
    /// asked to stop. Returns whether the run ends before this step: once one rank was asked, every rank
    /// ends before the same step, the first that no rank had begun.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost.
    fn begin_step(&mut self, step: u64, stop: bool) -> Result<bool>;

    /// Replaces `buffer` by the element-wise sum over all ranks, the same bits on each, and `totals` (loss
    /// sums, token counts) by their sums in rank order. The one exchange of an optimizer step.
    ///
    /// Counts below 2^53 are exact.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost, or if ranks ask for different things.
    fn all_reduce(&mut self, buffer: &mut FlatBuffer, totals: &mut [f64]) -> Result<()>;

    /// Says that `range` of `gradients` has its final value in this step, before the next
    /// [`ProcessGroup::all_reduce`] of the same buffer: a group may begin to sum it while backward goes
    /// on. Ranges come from the front of the buffer on. Ranks need not say it at the same points, and the
    /// sums have the same bits whether and when it is said. Until then nobody writes that range.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost.
    fn reduce_ready(&mut self, gradients: &mut FlatBuffer, range: Range<usize>) -> Result<()> {
        let _ = (gradients, range);
        Ok(())
    }

    /// Every rank's bytes, by rank. Lengths may differ.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost, or if ranks ask for different things.
    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Replaces `buffer` by rank 0's.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost, or if ranks ask for different things.
    fn broadcast(&mut self, buffer: &mut FlatBuffer) -> Result<()>;

    /// Replaces `totals` by their sums over all ranks, taken in rank order. Counts below 2^53 are exact.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_gather`].
    fn sum_totals(&mut self, totals: &mut [f64]) -> Result<()> {
        let all = self.all_gather(bytemuck::cast_slice(totals))?;
        for (i, total) in totals.iter_mut().enumerate() {
            *total = all
                .iter()
                .map(|bytes| bytemuck::pod_read_unaligned::<f64>(&bytes[i * 8..i * 8 + 8]))
                .sum();
        }
        Ok(())
    }

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_gather`].
    fn barrier(&mut self) -> Result<()> {
        self.all_gather(&[]).map(drop)
    }
}

/// A group of one: every reduction is the identity.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl ProcessGroup for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn begin_step(&mut self, _: u64, stop: bool) -> Result<bool> {
        Ok(stop)
    }
    fn all_reduce(&mut self, _: &mut FlatBuffer, _: &mut [f64]) -> Result<()> {
        Ok(())
    }
    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }
    fn broadcast(&mut self, _: &mut FlatBuffer) -> Result<()> {
        Ok(())
    }
}
