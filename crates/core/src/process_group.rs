//! The port that ranks implement: what a trainer needs of its peers.

use crate::Result;
use std::fmt::Debug;

/// A group of processes (or threads) that train one model together.
///
/// Every rank makes the same calls in the same order. After an error the group is unusable.
pub trait ProcessGroup: Debug + Send {
    /// This process, `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn world_size(&self) -> usize;

    /// Replaces `buffer` by the element-wise sum over all ranks, the same bits on each.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost.
    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<()>;

    /// Sums exact integers (token counts, flags) over all ranks.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost.
    fn all_reduce_counts(&mut self, counts: &mut [u64]) -> Result<()>;

    /// Sums f64 values (loss sums) over all ranks, in rank order.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost.
    fn all_reduce_sums(&mut self, sums: &mut [f64]) -> Result<()>;

    /// Replaces `buffer` by rank 0's.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost.
    fn broadcast(&mut self, buffer: &mut [f32]) -> Result<()>;

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// [`crate::Error::Transient`] if a peer is lost.
    fn barrier(&mut self) -> Result<()>;
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
    fn all_reduce(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn all_reduce_counts(&mut self, _: &mut [u64]) -> Result<()> {
        Ok(())
    }
    fn all_reduce_sums(&mut self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }
    fn broadcast(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }
}
