//! What the two passes share: how queries are cut into blocks and which keys a block sees.

pub(super) mod backward;
pub(super) mod forward;

use super::Config;
use crate::{Element, RowsMut, View};
use std::ops::Range;

/// Most queries of a block: scores of 64 x 1024 keys are 256 KiB and stay in L2.
const BLOCK_QUERIES: usize = 64;
/// Scores held at once: longer contexts get shorter blocks of queries.
const BLOCK_SCORES: usize = 256 << 10;
/// Multiply-adds of a whole call below which one thread is quicker than waking another.
const PARALLEL_WORK: usize = 1 << 18;

/// Queries, keys and values of a batch.
pub(super) struct Inputs<'a> {
    pub(super) q: View<'a>,
    pub(super) k: View<'a>,
    pub(super) v: View<'a>,
}

/// One sequence: its rows among the queries and among the keys.
#[derive(Clone, Debug)]
struct Sequence {
    q: Range<usize>,
    k: Range<usize>,
    window: usize,
}

impl Sequence {
    /// Keys that some query of `queries` sees, all counted from the start of the sequence.
    fn keys_of(&self, queries: &Range<usize>) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        let past = self.k.len() - self.q.len();
        let first = (queries.start + past + 1).saturating_sub(self.window);
        first..queries.end + past
    }

    /// The keys of query `i` as columns of the scores of a block that starts at key `first`.
    fn columns_of(&self, i: usize, first: usize) -> Range<usize> {
        let keys = self.keys_of(&(i..i + 1));
        keys.start - first..keys.end - first
    }

    /// Queries of a block, a function of the shape alone.
    fn block_queries(&self) -> usize {
        let keys = self.longest_span(self.k.len());
        (BLOCK_SCORES / keys.max(1)).clamp(8, BLOCK_QUERIES)
    }

    /// Most keys that a block of queries sees of `keys`.
    fn longest_span(&self, keys: usize) -> usize {
        keys.min(self.window.saturating_add(BLOCK_QUERIES))
    }

    /// Scores that one head computes, as a measure of work.
    fn work(&self) -> usize {
        self.q.len() * self.k.len().min(self.window)
    }
}

fn sequences(config: &Config, cu_q: &[u32], cu_k: &[u32]) -> Vec<Sequence> {
    let range = |pair: &[u32]| pair[0] as usize..pair[1] as usize;
    cu_q.windows(2)
        .zip(cu_k.windows(2))
        .map(|(q, k)| Sequence {
            q: range(q),
            k: range(k),
            window: config.window.unwrap_or(usize::MAX),
        })
        .filter(|sequence| !sequence.q.is_empty())
        .collect()
}

/// Zeros the rows of `matrix` from `end` on, which belong to no sequence.
fn clear_padding<T: Element>(matrix: &mut RowsMut<'_, T>, end: usize) {
    for row in end..matrix.rows() {
        matrix.row_mut(row).fill(T::default());
    }
}

/// `range` cut into blocks of at most `len`.
fn blocks(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(len)
        .map(move |start| start..end.min(start + len))
}

/// Columns of head `head`.
fn head_columns(head: usize, head_dim: usize) -> Range<usize> {
    head * head_dim..(head + 1) * head_dim
}

/// `range` moved by `start`.
fn shifted(range: &Range<usize>, start: usize) -> Range<usize> {
    range.start + start..range.end + start
}
