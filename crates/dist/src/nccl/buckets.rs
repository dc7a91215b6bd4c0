//! How a flat buffer is cut into collectives.

use std::ops::Range;

/// Progress over a buffer of `len` elements that is cut every `bucket` elements.
///
/// The cuts follow from `len` and `bucket` alone, so every rank makes the same collectives in the same
/// order, however early each part of the buffer became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buckets {
    len: usize,
    bucket: usize,
    ready: usize,
    sent: usize,
}

impl Buckets {
    /// Nothing is ready yet. `bucket` is at least 1.
    pub(super) fn new(len: usize, bucket: usize) -> Self {
        Self {
            len,
            bucket: bucket.max(1),
            ready: 0,
            sent: 0,
        }
    }

    /// Elements of the whole buffer.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Notes that `range` is ready. What does not follow the ready front has to wait for the end.
    pub(super) fn ready(&mut self, range: &Range<usize>) {
        if range.start <= self.ready {
            self.ready = self.ready.max(range.end.min(self.len));
        }
    }

    /// The next bucket that is ready as a whole and was not taken yet.
    pub(super) fn next(&mut self) -> Option<Range<usize>> {
        let end = self.sent.saturating_add(self.bucket).min(self.len);
        if self.sent == self.len || end > self.ready {
            return None;
        }
        Some(std::mem::replace(&mut self.sent, end)..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(buckets: &mut Buckets) -> Vec<Range<usize>> {
        std::iter::from_fn(|| buckets.next()).collect()
    }

    #[test]
    fn cuts_are_the_same_however_early_parts_are_ready() {
        for (len, bucket) in [(0, 4), (1, 4), (4, 4), (10, 4), (1000, 7), (5, usize::MAX)] {
            let mut at_once = Buckets::new(len, bucket);
            at_once.ready(&(0..len));
            let expected = taken(&mut at_once);
            assert_eq!(expected.iter().map(Range::len).sum::<usize>(), len);
            for step in [1, 3, 5, 64] {
                let mut buckets = Buckets::new(len, bucket);
                let mut all = Vec::new();
                for start in (0..len).step_by(step) {
                    buckets.ready(&(start..(start + step).min(len)));
                    all.extend(taken(&mut buckets));
                }
                assert_eq!(all, expected, "{len} elements, {step} at a time");
            }
        }
    }

    #[test]
    fn a_bucket_leaves_only_when_all_of_it_is_ready() {
        let mut buckets = Buckets::new(10, 4);
        buckets.ready(&(0..3));
        assert_eq!(buckets.next(), None);
        // A gap before it: not yet.
        buckets.ready(&(5..10));
        assert_eq!(buckets.next(), None);
        buckets.ready(&(3..9));
        assert_eq!(taken(&mut buckets), [0..4, 4..8]);
        buckets.ready(&(0..10));
        assert_eq!(taken(&mut buckets), [8..10; 1]);
    }
}
