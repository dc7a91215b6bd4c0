use crate::row_blocks::{blocks, rows_per_block};
use crate::simd::{dispatch, exp};
use crate::{Element, Rows, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator};

pub(super) fn forward<X: Element, Y: Element>(gate_up: Rows<'_, X>, mut out: RowsMut<'_, Y>) {
    let step = rows_per_block(out.cols());
    blocks(&mut out).enumerate().for_each(|(block, mut out)| {
        dispatch(
            #[inline(always)]
            || {
                for (t, out) in (block * step..).zip(out.rows()) {
                    let (gate, up) = gate_up.row(t).split_at(out.len());
                    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                        let (gate, up) = (gate.to_f32(), up.to_f32());
                        *out = Y::from_f32(gate / (1.0 + exp(-gate)) * up);
                    }
                }
            },
        );
    });
}

pub(super) fn backward_in_place<X: Element, G: Element>(
    mut gate_up: RowsMut<'_, X>,
    d_out: Rows<'_, G>,
) {
    let step = rows_per_block(gate_up.cols());
    blocks(&mut gate_up)
        .enumerate()
        .for_each(|(block, mut gate_up)| {
            dispatch(
                #[inline(always)]
                || {
                    for (t, row) in (block * step..).zip(gate_up.rows()) {
                        let d_out = d_out.row(t);
                        let (gate, up) = row.split_at_mut(d_out.len());
                        backward_row(gate, up, d_out);
                    }
                },
            );
        });
}

#[inline(always)]
fn backward_row<X: Element, G: Element>(gate: &mut [X], up: &mut [X], d_out: &[G]) {
    for ((gate, up), d_out) in gate.iter_mut().zip(up).zip(d_out) {
        let (g, u, d) = (gate.to_f32(), up.to_f32(), d_out.to_f32());
        let sigmoid = 1.0 / (1.0 + exp(-g));
        *gate = X::from_f32(d * u * sigmoid * g.mul_add(1.0 - sigmoid, 1.0));
        *up = X::from_f32(d * (g * sigmoid));
    }
}
