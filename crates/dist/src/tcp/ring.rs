//! All-reduce around a ring.
//!
//! The buffer is cut into one segment per rank. In W - 1 steps each segment travels once around, each rank
//! adding its own values, and in W - 1 more the sums travel around. A segment is summed in one order,
//! whoever looks, so every rank ends with the same bits. What a rank sends in step s + 1 is what it receives
//! in step s, so both directions run as one stream: each byte goes on as soon as it is summed.

use super::pump::{Exchange, Fault};
use std::ops::Range;

/// Values of the sums' staging area.
pub(super) const SCRATCH: usize = 64 << 10;

/// A place in the stream of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor {
    step: usize,
    /// Bytes of the step's segment that are through.
    offset: usize,
}

/// One all-reduce.
#[derive(Debug)]
pub(super) struct Ring<'a> {
    values: &'a mut [f32],
    scratch: &'a mut [f32],
    /// Bytes in `scratch`.
    filled: usize,
    rank: usize,
    world: usize,
    sent: Cursor,
    summed: Cursor,
}

impl<'a> Ring<'a> {
    /// Sums `values` over `world` > 1 ranks; `scratch` holds [`SCRATCH`] values.
    pub(super) fn new(
        rank: usize,
        world: usize,
        values: &'a mut [f32],
        scratch: &'a mut [f32],
    ) -> Self {
        let begin = Cursor { step: 0, offset: 0 };
        let mut ring = Self {
            values,
            scratch,
            filled: 0,
            rank,
            world,
            sent: begin,
            summed: begin,
        };
        ring.sent = ring.skip_empty(begin, 0);
        ring.summed = ring.skip_empty(begin, 1);
        ring
    }

    fn steps(&self) -> usize {
        2 * (self.world - 1)
    }

    fn next(&self) -> usize {
        (self.rank + 1) % self.world
    }

    fn previous(&self) -> usize {
        (self.rank + self.world - 1) % self.world
    }

    /// Bytes of the segment of a step, in the stream that is `lag` steps behind the one sent.
    fn segment(&self, step: usize, lag: usize) -> Range<usize> {
        let index = (self.rank + 2 * self.world - (step + lag)) % self.world;
        let at = |i: usize| 4 * (i * self.values.len() / self.world);
        at(index)..at(index + 1)
    }

    /// `cursor`, or the beginning of the next segment that has anything left.
    fn skip_empty(&self, mut cursor: Cursor, lag: usize) -> Cursor {
        while cursor.step < self.steps() && cursor.offset == self.segment(cursor.step, lag).len() {
            cursor.step += 1;
            cursor.offset = 0;
        }
        cursor
    }

    /// Whether what arrives is added (or replaces what is there).
    fn is_summing(&self) -> bool {
        self.summed.step < self.world - 1
    }

    /// Adds the whole values in `scratch`, keeps the rest. Returns the bytes summed.
    fn add(&mut self) -> usize {
        let whole = self.filled / 4;
        let at = (self.segment(self.summed.step, 1).start + self.summed.offset) / 4;
        let arrived = &self.scratch[..whole];
        for (value, arrived) in self.values[at..at + whole].iter_mut().zip(arrived) {
            *value += arrived;
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(self.scratch);
        bytes.copy_within(4 * whole..self.filled, 0);
        self.filled -= 4 * whole;
        4 * whole
    }
}

impl Exchange for Ring<'_> {
    fn outgoing(&self, peer: usize) -> &[u8] {
        let Cursor { step, offset } = self.sent;
        if peer != self.next() || step == self.steps() {
            return &[];
        }
        let segment = self.segment(step, 0);
        // The segment of step s + 1 is the one that arrives in step s.
        let ready = if step == 0 || step - 1 < self.summed.step {
            segment.len()
        } else if step - 1 == self.summed.step {
            self.summed.offset
        } else {
            0
        };
        let bytes: &[u8] = bytemuck::cast_slice(self.values);
        &bytes[segment.start + offset..segment.start + ready.max(offset)]
    }

    fn sent(&mut self, _: usize, bytes: usize) {
        let Cursor { step, offset } = self.sent;
        let offset = offset + bytes;
        self.sent = self.skip_empty(Cursor { step, offset }, 0);
    }

    fn incoming(&mut self, peer: usize) -> &mut [u8] {
        let Cursor { step, offset } = self.summed;
        if peer != self.previous() || step == self.steps() {
            return &mut [];
        }
        let segment = self.segment(step, 1);
        if self.is_summing() {
            let left = segment.len() - offset;
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(self.scratch);
            let end = bytes.len().min(left);
            &mut bytes[self.filled..end]
        } else {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(self.values);
            &mut bytes[segment.start + offset..segment.end]
        }
    }

    fn received(&mut self, _: usize, bytes: usize) -> Result<(), Fault> {
        let through = if self.is_summing() {
            self.filled += bytes;
            self.add()
        } else {
            bytes
        };
        let Cursor { step, offset } = self.summed;
        let offset = offset + through;
        self.summed = self.skip_empty(Cursor { step, offset }, 1);
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.sent.step == self.steps() && self.summed.step == self.steps()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moves at most `limit` bytes at a time around a ring in memory, until all are done.
    fn reduce(world: usize, length: usize, limit: usize) -> Vec<Vec<f32>> {
        let mut values: Vec<Vec<f32>> = (0..world)
            .map(|rank| (0..length).map(|i| 0.1 * (rank + i + 1) as f32).collect())
            .collect();
        let mut scratch = vec![vec![0.0; 16]; world];
        let mut rings: Vec<Ring<'_>> = values
            .iter_mut()
            .zip(&mut scratch)
            .enumerate()
            .map(|(rank, (values, scratch))| Ring::new(rank, world, values, scratch))
            .collect();
        for _ in 0..1_000_000 {
            if rings.iter().all(Ring::is_done) {
                drop(rings);
                return values;
            }
            for rank in 0..world {
                let to = (rank + 1) % world;
                let bytes = rings[rank].outgoing(to).to_vec();
                let space = rings[to].incoming(rank);
                let n = bytes.len().min(space.len()).min(limit);
                space[..n].copy_from_slice(&bytes[..n]);
                if n > 0 {
                    rings[rank].sent(to, n);
                    rings[to].received(rank, n).expect("nothing to object");
                }
            }
        }
        panic!("{world} ranks, {length} values, {limit} bytes at a time: stuck");
    }

    #[test]
    fn every_rank_ends_with_the_same_bits_of_the_sum() {
        for world in 2..6 {
            for length in [0, 1, 2, 3, 4, 5, 7, 64, 123] {
                // Three bytes at a time cut values apart.
                for limit in [3, 64, usize::MAX] {
                    let values = reduce(world, length, limit);
                    for i in 0..length {
                        let exact: f64 = (0..world).map(|r| 0.1 * (r + i + 1) as f64).sum();
                        let error = (f64::from(values[0][i]) - exact).abs();
                        assert!(error < 1e-6 * exact, "{world} ranks, value {i} of {length}");
                        for other in &values {
                            assert_eq!(other[i].to_bits(), values[0][i].to_bits());
                        }
                    }
                }
            }
        }
    }
}
