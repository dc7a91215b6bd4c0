//! Lengths that micro-batches are padded to on a GPU.
//!
//! A GPU chooses algorithms, and records graphs, for every length it meets. So that it meets few, rows
//! are added up to the next length of a coarse scale: tokens that belong to no document, are not
//! trained on, and change no bit of a gradient.

/// Rows are added up to a multiple of this at least.
const LEAST_STEP: usize = 16;
/// At most one row in so many is added, above the lengths for which the least step is more.
const SHARE: usize = 32;

/// The least length of the scale that holds `rows`: at most 15 more, or less than 1/32 more.
///
/// Between a power of two and the next there are 32 lengths, or fewer below 1024.
#[must_use]
pub fn padded_rows(rows: usize) -> usize {
    let share = rows / SHARE;
    let step = match share.checked_ilog2() {
        Some(log) => LEAST_STEP.max(1 << log),
        None => LEAST_STEP,
    };
    rows.next_multiple_of(step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn little_is_added_and_few_lengths_are_met() {
        for rows in (0..40_000).chain([1 << 20, (1 << 20) + 1]) {
            let padded = padded_rows(rows);
            let added = padded - rows;
            assert!(added <= 15 || added * SHARE < rows, "{rows} to {padded}");
            assert_eq!(padded_rows(padded), padded);
            assert!(padded_rows(rows + 1) >= padded);
        }
        let lengths = |rows: std::ops::Range<usize>| -> usize {
            rows.map(padded_rows).collect::<BTreeSet<_>>().len()
        };
        assert_eq!(lengths(2048..4096), 33);
        assert_eq!(lengths(0..512), 33);
        assert_eq!([0, 1, 16, 17].map(padded_rows), [0, 16, 16, 32]);
    }
}
