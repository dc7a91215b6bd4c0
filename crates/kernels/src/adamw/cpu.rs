use super::{AdamW, Group};
use crate::lanes::{LANES, total};
use crate::row_blocks::BLOCK_ELEMENTS;
use crate::simd::dispatch;
use rayon::prelude::{IntoParallelIterator, ParallelIterator, ParallelSlice};

pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    let partial_sums: Vec<f64> = values
        .par_chunks(BLOCK_ELEMENTS)
        .map(|chunk| {
            dispatch(
                #[inline(always)]
                || sum_of_squares_of_chunk(chunk),
            )
        })
        .collect();
    partial_sums.iter().sum()
}

#[inline(always)]
fn sum_of_squares_of_chunk(values: &[f32]) -> f64 {
    #[inline(always)]
    fn step(lanes: &mut [f64; LANES], values: &[f32]) {
        for (lane, &value) in lanes.iter_mut().zip(values) {
            let value = f64::from(value);
            *lane = value.mul_add(value, *lane);
        }
    }
    let mut lanes = [0.0; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        step(&mut lanes, chunk);
    }
    step(&mut lanes, rest);
    total(lanes)
}

/// The scalars of a group, rounded to the f32 the update runs in.
#[derive(Clone, Copy)]
pub(super) struct Scalars {
    grad_scale: f32,
    pub(super) keep: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    pub(super) inverse_sqrt_bias2: f32,
    eps: f32,
    pub(super) step_size: f32,
}

impl Scalars {
    pub(super) fn new(cfg: &AdamW, group: &Group, grad_scale: f32) -> Self {
        let steps = group.step as f64;
        let bias1 = 1.0 - cfg.beta1.powf(steps);
        let bias2 = 1.0 - cfg.beta2.powf(steps);
        Self {
            grad_scale,
            keep: (1.0 - group.lr * group.weight_decay) as f32,
            beta1: cfg.beta1 as f32,
            one_minus_beta1: (1.0 - cfg.beta1) as f32,
            beta2: cfg.beta2 as f32,
            one_minus_beta2: (1.0 - cfg.beta2) as f32,
            inverse_sqrt_bias2: bias2.sqrt().recip() as f32,
            eps: cfg.eps as f32,
            step_size: (group.lr / bias1) as f32,
        }
    }
}

/// Part of the flat buffers under one set of scalars: the work of one job.
struct Piece<'a> {
    scalars: Scalars,
    params: &'a mut [f32],
    grads: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
}

/// `ordered` groups are disjoint, inside the buffer and sorted by their start.
pub(super) fn step(
    cfg: &AdamW,
    params: &mut [f32],
    grads: &[f32],
    grad_scale: f32,
    m: &mut [f32],
    v: &mut [f32],
    ordered: &[&Group],
) {
    let (mut params, mut m, mut v) = (params, m, v);
    let mut at = 0;
    let mut pieces = Vec::new();
    for group in ordered {
        let scalars = Scalars::new(cfg, group, grad_scale);
        let (skip, len) = (group.range.start - at, group.range.len());
        let chunks = take(&mut params, skip, len)
            .chunks_mut(BLOCK_ELEMENTS)
            .zip(grads[group.range.clone()].chunks(BLOCK_ELEMENTS))
            .zip(take(&mut m, skip, len).chunks_mut(BLOCK_ELEMENTS))
            .zip(take(&mut v, skip, len).chunks_mut(BLOCK_ELEMENTS));
        pieces.extend(chunks.map(|(((params, grads), m), v)| Piece {
            scalars,
            params,
            grads,
            m,
            v,
        }));
        at = group.range.end;
    }
    pieces.into_par_iter().for_each(|piece| {
        dispatch(
            #[inline(always)]
            || update(piece),
        );
    });
}

/// Cuts `len` elements after the next `skip` out of `rest`.
fn take<'a>(rest: &mut &'a mut [f32], skip: usize, len: usize) -> &'a mut [f32] {
    let (_, tail) = std::mem::take(rest).split_at_mut(skip);
    let (taken, after) = tail.split_at_mut(len);
    *rest = after;
    taken
}

#[inline(always)]
fn update(piece: Piece<'_>) {
    let s = piece.scalars;
    let state = piece.m.iter_mut().zip(piece.v);
    for ((p, g), (m, v)) in piece.params.iter_mut().zip(piece.grads).zip(state) {
        let g = g * s.grad_scale;
        *m = m.mul_add(s.beta1, g * s.one_minus_beta1);
        *v = v.mul_add(s.beta2, g * g * s.one_minus_beta2);
        let denominator = v.sqrt().mul_add(s.inverse_sqrt_bias2, s.eps);
        *p = (*m / denominator).mul_add(-s.step_size, *p * s.keep);
    }
}
