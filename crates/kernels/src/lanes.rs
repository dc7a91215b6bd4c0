//! Sums in a fixed order that also vectorises.
//!
//! A sum over a row is kept in [`LANES`] partial sums, element `i` in lane `i % LANES`, and the
//! lanes are added pairwise at the end: the same bits on every vector width and thread count.

use std::ops::Add;

/// Partial sums of a reduction: enough to hide the latency of an addition at 512 bits.
pub(crate) const LANES: usize = 64;

/// Adds the lanes pairwise.
#[inline(always)]
pub(crate) fn total<S: Copy + Add<Output = S>>(mut lanes: [S; LANES]) -> S {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        let (low, high) = lanes.split_at_mut(width);
        for (low, high) in low.iter_mut().zip(high) {
            *low = *low + *high;
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_counts_every_lane_once() {
        assert_eq!(total(std::array::from_fn(|i| 1_u64 << i)), u64::MAX);
    }
}
