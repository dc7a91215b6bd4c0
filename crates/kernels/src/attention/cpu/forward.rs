use super::{
    BLOCK_QUERIES, Inputs, PARALLEL_WORK, Sequence, blocks, clear_padding, head_columns, shifted,
};
use crate::attention::Config;
use crate::lanes::{LANES, total};
use crate::matmul::block::{
    Matrix, SharedMut, carve, gemm, view_flipped, view_operand, with_scratch,
};
use crate::{Element, RowsMut, simd};
use rayon::prelude::*;
use std::ops::Range;

/// Queries of one task, each with all query heads that share its key head. The keys are converted
/// and transposed once per task.
const TASK_QUERIES: usize = 512;
/// Rows of scores from which transposing the keys first pays for itself.
const TRANSPOSE_ROWS: usize = 16;

struct Task {
    sequence: Sequence,
    queries: Range<usize>,
    kv_head: usize,
}

/// Where the results go; tasks write disjoint rows and heads.
struct Output<'a, T> {
    out: SharedMut<T>,
    pitch: usize,
    lse: SharedMut<f32>,
    config: &'a Config,
}

pub(in crate::attention) fn run<T: Element>(
    config: &Config,
    inputs: &Inputs<'_>,
    cu_q: &[u32],
    cu_k: &[u32],
    mut out: RowsMut<'_, T>,
    lse: &mut [f32],
) {
    let end = cu_q.last().map_or(0, |end| *end as usize);
    lse[end * config.heads..].fill(0.0);
    clear_padding(&mut out, end);
    let sequences = super::sequences(config, cu_q, cu_k);
    let work: usize = sequences.iter().map(Sequence::work).sum();
    let mut tasks = Vec::new();
    for sequence in &sequences {
        for queries in blocks(0..sequence.q.len(), TASK_QUERIES) {
            tasks.extend((0..config.kv_heads).map(|kv_head| Task {
                sequence: sequence.clone(),
                queries: queries.clone(),
                kv_head,
            }));
        }
    }
    let pitch = out.pitch();
    let output = Output {
        out: SharedMut::new(out.data_mut()),
        pitch,
        lse: SharedMut::new(lse),
        config,
    };
    if work * config.heads * config.head_dim < PARALLEL_WORK {
        tasks.iter().for_each(|task| task.run(inputs, &output));
    } else {
        tasks
            .par_iter()
            .with_max_len(1)
            .for_each(|task| task.run(inputs, &output));
    }
}

impl Task {
    fn run<T: Element>(&self, inputs: &Inputs<'_>, output: &Output<'_, T>) {
        let (config, sequence) = (output.config, &self.sequence);
        let (width, group) = (config.head_dim, config.heads / config.kv_heads);
        let keys = sequence.keys_of(&self.queries);
        let block = sequence.block_queries();
        let scores = block * sequence.longest_span(keys.len());
        let len = 2 * keys.len() * width + scores + 2 * block * width;
        with_scratch(len, |mut scratch| {
            let columns = head_columns(self.kv_head, width);
            let rows = shifted(&keys, sequence.k.start);
            let k_scratch = carve(&mut scratch, keys.len() * width);
            let all_keys = if self.queries.len() * group >= TRANSPOSE_ROWS {
                let keys = view_flipped(inputs.k, rows.clone(), columns.clone(), k_scratch);
                Keys::Transposed(keys)
            } else {
                let keys = view_operand(inputs.k, rows.clone(), columns.clone(), k_scratch);
                Keys::Rows(keys)
            };
            let v_scratch = carve(&mut scratch, keys.len() * width);
            let v = view_operand(inputs.v, rows, columns, v_scratch);
            for head in self.kv_head * group..(self.kv_head + 1) * group {
                for queries in blocks(self.queries.clone(), block) {
                    let visible = sequence.keys_of(&queries);
                    let local = visible.start - keys.start..visible.end - keys.start;
                    let k = all_keys.columns(local.clone());
                    let v = v.rows(local);
                    self.block(inputs, output, head, &queries, k, v, scratch);
                }
            }
        });
    }

    /// One head of one block of queries against the keys `k [E, n]` and values `v [n, E]` it sees.
    #[expect(
        clippy::too_many_arguments,
        reason = "a block, its operands and its memory"
    )]
    fn block<T: Element>(
        &self,
        inputs: &Inputs<'_>,
        output: &Output<'_, T>,
        head: usize,
        queries: &Range<usize>,
        k: Matrix<'_>,
        v: Matrix<'_>,
        mut scratch: &mut [f32],
    ) {
        let (config, sequence) = (output.config, &self.sequence);
        let (width, keys) = (config.head_dim, sequence.keys_of(queries));
        let rows = shifted(queries, sequence.q.start);
        let q_scratch = carve(&mut scratch, queries.len() * width);
        let q = view_operand(inputs.q, rows.clone(), head_columns(head, width), q_scratch);
        let sums = carve(&mut scratch, queries.len() * width);
        let scores = &mut scratch[..queries.len() * keys.len()];
        gemm(scores, keys.len(), 0.0, config.scale, q, k);
        // The sum of each row is kept until the row of the output replaces it.
        let mut norms = [0.0_f32; BLOCK_QUERIES];
        simd::dispatch(
            #[inline(always)]
            || {
                let rows_of_scores = scores.chunks_exact_mut(keys.len());
                for ((i, row), norm) in queries.clone().zip(rows_of_scores).zip(&mut norms) {
                    let visible = sequence.columns_of(i, keys.start);
                    if let Some(softcap) = config.softcap {
                        cap(&mut row[visible.clone()], softcap);
                    }
                    let (max, sum) = exponentials(row, visible);
                    *norm = sum.recip();
                    let at = (sequence.q.start + i) * config.heads + head;
                    // SAFETY: this task alone writes this head of its queries; `lse` is [Tq, H].
                    unsafe { *output.lse.at(at) = max + sum.ln() };
                }
            },
        );
        let scores = Matrix::new(scores, queries.len(), keys.len(), keys.len());
        gemm(sums, width, 0.0, 1.0, scores, v);
        for ((row, sums), norm) in rows.zip(sums.chunks_exact(width)).zip(norms) {
            let start = row * output.pitch + head * width;
            // SAFETY: this task alone writes this head of its queries, inside `out`.
            let out = unsafe { output.out.slice(start..start + width) };
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = T::from_f32(sum * norm);
            }
        }
    }
}

/// The keys of a task.
enum Keys<'a> {
    /// `[E, n]`.
    Transposed(Matrix<'a>),
    /// `[n, E]`: a few queries read them once, transposing would cost as much.
    Rows(Matrix<'a>),
}

impl<'a> Keys<'a> {
    /// `[E, n]` for the keys `range`.
    fn columns(&self, range: Range<usize>) -> Matrix<'a> {
        match self {
            Self::Transposed(keys) => keys.columns(range),
            Self::Rows(keys) => keys.rows(range).transposed(),
        }
    }
}

/// Replaces scores by `softcap * tanh(score / softcap)`.
fn cap(scores: &mut [f32], softcap: f32) {
    for score in scores {
        *score = softcap * (*score / softcap).tanh();
    }
}

/// Replaces the scores in `visible` by `exp(score - max)`, the others by zero; (max, sum).
#[inline(always)]
fn exponentials(row: &mut [f32], visible: Range<usize>) -> (f32, f32) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let row = &mut row[visible];
    let max = maximum(row);
    let mut sums = [0.0_f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (value, sum) in chunk.iter_mut().zip(&mut sums) {
            *value = simd::exp(*value - max);
            *sum += *value;
        }
    }
    for (value, sum) in chunks.into_remainder().iter_mut().zip(&mut sums) {
        *value = simd::exp(*value - max);
        *sum += *value;
    }
    (max, total(sums))
}

#[inline(always)]
fn maximum(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (max, &value) in lanes.iter_mut().zip(chunk) {
            *max = if value > *max { value } else { *max };
        }
    }
    for (max, &value) in lanes.iter_mut().zip(rest) {
        *max = if value > *max { value } else { *max };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}
