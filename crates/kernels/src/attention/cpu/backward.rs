use super::{Inputs, PARALLEL_WORK, Sequence, blocks, clear_padding, head_columns, shifted};
use crate::attention::Config;
use crate::lanes::{LANES, total};
use crate::matmul::block::{
    Matrix, SharedMut, carve, gemm, view_flipped, view_operand, with_scratch,
};
use crate::{Element, RowsMut, View, simd};
use rayon::prelude::*;
use std::ops::Range;

/// What the forward pass left, and the gradient of its output.
pub(in crate::attention) struct Saved<'a> {
    pub(in crate::attention) out: View<'a>,
    pub(in crate::attention) lse: &'a [f32],
    pub(in crate::attention) d_out: View<'a>,
}

/// Where the gradients go; tasks write disjoint rows and heads.
struct Output<T> {
    data: SharedMut<T>,
    pitch: usize,
}

impl<T: Element> Output<T> {
    /// Writes `values [rows, width]` to the columns from `column` of the rows `rows`.
    ///
    /// # Safety
    /// The rectangle must lie inside the matrix and belong to the calling task.
    unsafe fn write(&self, values: &[f32], rows: Range<usize>, column: usize, width: usize) {
        for (row, values) in rows.zip(values.chunks_exact(width)) {
            let start = row * self.pitch + column;
            // SAFETY: the caller's promise.
            let to = unsafe { self.data.slice(start..start + width) };
            for (to, &value) in to.iter_mut().zip(values) {
                *to = T::from_f32(value);
            }
        }
    }
}

/// One sequence and key head, with all query heads that share it.
struct Task<'a> {
    config: &'a Config,
    inputs: &'a Inputs<'a>,
    saved: &'a Saved<'a>,
    sequence: &'a Sequence,
    kv_head: usize,
}

/// Keys and values of a task `[E, n]`, the keys also `[n, E]`.
struct Keys<'a> {
    k: Matrix<'a>,
    k_transposed: Matrix<'a>,
    v_transposed: Matrix<'a>,
}

pub(in crate::attention) fn run<T: Element>(
    config: &Config,
    inputs: &Inputs<'_>,
    saved: &Saved<'_>,
    cu_seqlens: &[u32],
    mut d_qkv: RowsMut<'_, T>,
) {
    clear_padding(&mut d_qkv, cu_seqlens.last().map_or(0, |end| *end as usize));
    let sequences = super::sequences(config, cu_seqlens, cu_seqlens);
    let work: usize = sequences.iter().map(Sequence::work).sum();
    let tasks: Vec<Task<'_>> = sequences
        .iter()
        .flat_map(|sequence| {
            (0..config.kv_heads).map(move |kv_head| Task {
                config,
                inputs,
                saved,
                sequence,
                kv_head,
            })
        })
        .collect();
    let pitch = d_qkv.pitch();
    let output = Output {
        data: SharedMut::new(d_qkv.data_mut()),
        pitch,
    };
    if work * config.heads * config.head_dim < PARALLEL_WORK {
        tasks.iter().for_each(|task| task.run(&output));
    } else {
        let tasks = tasks.par_iter().with_max_len(1);
        tasks.for_each(|task| task.run(&output));
    }
}

impl Task<'_> {
    fn run<T: Element>(&self, output: &Output<T>) {
        let (config, sequence) = (self.config, self.sequence);
        let (width, keys) = (config.head_dim, sequence.k.len());
        let block = sequence.block_queries();
        let scores = block * sequence.longest_span(keys);
        let len = 5 * keys * width + 2 * scores + 4 * block * width;
        with_scratch(len, |mut scratch| {
            let d_k = carve(&mut scratch, keys * width);
            let d_v = carve(&mut scratch, keys * width);
            d_k.fill(0.0);
            d_v.fill(0.0);
            let (rows, columns) = (sequence.k.clone(), head_columns(self.kv_head, width));
            let mut memory = || carve(&mut scratch, keys * width);
            let inputs = self.inputs;
            let operands = Keys {
                k: view_operand(inputs.k, rows.clone(), columns.clone(), memory()),
                k_transposed: view_flipped(inputs.k, rows.clone(), columns.clone(), memory()),
                v_transposed: view_flipped(inputs.v, rows.clone(), columns, memory()),
            };
            let group = config.heads / config.kv_heads;
            for head in self.kv_head * group..(self.kv_head + 1) * group {
                for queries in blocks(0..sequence.q.len(), block) {
                    self.block(output, head, &queries, &operands, d_k, d_v, scratch);
                }
            }
            let k_column = (config.heads + self.kv_head) * width;
            let v_column = k_column + config.kv_heads * width;
            // SAFETY: this task alone writes the columns of its key head in its rows.
            unsafe {
                output.write(d_k, rows.clone(), k_column, width);
                output.write(d_v, rows, v_column, width);
            }
        });
    }

    /// One head of one block of queries: writes its dq, adds to `d_k [n, E]` and `d_v [n, E]`.
    #[expect(
        clippy::too_many_arguments,
        reason = "a block, its operands, results and memory"
    )]
    fn block<T: Element>(
        &self,
        output: &Output<T>,
        head: usize,
        queries: &Range<usize>,
        operands: &Keys<'_>,
        d_k: &mut [f32],
        d_v: &mut [f32],
        mut scratch: &mut [f32],
    ) {
        let (width, scale) = (self.config.head_dim, self.config.scale);
        let keys = self.sequence.keys_of(queries);
        let (count, span) = (queries.len(), keys.len());
        let rows = shifted(queries, self.sequence.q.start);
        let columns = head_columns(head, width);
        let mut memory = || carve(&mut scratch, count * width);
        let q = view_operand(self.inputs.q, rows.clone(), columns.clone(), memory());
        let out = view_operand(self.saved.out, rows.clone(), columns.clone(), memory());
        let d_out = view_operand(self.saved.d_out, rows.clone(), columns.clone(), memory());
        let d_q = memory();
        let p = carve(&mut scratch, count * span);
        let d_s = carve(&mut scratch, count * span);

        gemm(
            p,
            span,
            0.0,
            scale,
            q,
            operands.k_transposed.columns(keys.clone()),
        );
        gemm(
            d_s,
            span,
            0.0,
            1.0,
            d_out,
            operands.v_transposed.columns(keys.clone()),
        );
        simd::dispatch(
            #[inline(always)]
            || {
                let pairs = p.chunks_exact_mut(span).zip(d_s.chunks_exact_mut(span));
                for (r, (p, d_s)) in pairs.enumerate() {
                    let lse = self.saved.lse[(rows.start + r) * self.config.heads + head];
                    let delta = dot(out.row(r), d_out.row(r));
                    let visible = self.sequence.columns_of(queries.start + r, keys.start);
                    hide(p, &visible);
                    hide(d_s, &visible);
                    let (p, d_s) = (&mut p[visible.clone()], &mut d_s[visible]);
                    match self.config.softcap {
                        None => score_gradients(p, d_s, lse, delta),
                        Some(softcap) => capped_gradients(p, d_s, softcap, lse, delta),
                    }
                }
            },
        );
        let p = Matrix::new(p, count, span, span);
        let d_s = Matrix::new(d_s, count, span, span);
        let visible = keys.start * width..keys.end * width;
        gemm(
            &mut d_v[visible.clone()],
            width,
            1.0,
            1.0,
            p.transposed(),
            d_out,
        );
        gemm(&mut d_k[visible], width, 1.0, scale, d_s.transposed(), q);
        gemm(d_q, width, 0.0, scale, d_s, operands.k.rows(keys));
        // SAFETY: this task alone writes the columns of its query heads in its rows.
        unsafe { output.write(d_q, rows, columns.start, width) };
    }
}

/// Zeroes what is not `visible`.
#[inline(always)]
fn hide(row: &mut [f32], visible: &Range<usize>) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
}

/// Scores to probabilities, their gradients to those of the unscaled scores.
#[inline(always)]
fn score_gradients(p: &mut [f32], d_s: &mut [f32], lse: f32, delta: f32) {
    for (p, d_s) in p.iter_mut().zip(d_s) {
        *p = simd::exp(*p - lse);
        *d_s = *p * (*d_s - delta);
    }
}

/// [`score_gradients`] of scores that a softcap bounds.
#[inline(always)]
fn capped_gradients(p: &mut [f32], d_s: &mut [f32], softcap: f32, lse: f32, delta: f32) {
    for (p, d_s) in p.iter_mut().zip(d_s) {
        let tanh = (*p / softcap).tanh();
        *p = simd::exp(softcap * tanh - lse);
        *d_s = *p * (*d_s - delta) * (1.0 - tanh * tanh);
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((sum, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *sum = a.mul_add(*b, *sum);
        }
    }
    total(lanes)
}
