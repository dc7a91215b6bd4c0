use crate::{Rows, RowsMut};
use rayon::prelude::*;

pub(super) fn product(
    mut out: RowsMut<'_, f32>,
    a: Rows<'_, f32>,
    g: Rows<'_, f32>,
    scale: &[f32],
) {
    let b = g.rows().max(1);
    out.par_rows_mut().enumerate().for_each(|(j, row)| {
        for (k, (row, scale)) in row.chunks_mut(b).zip(scale.chunks(b)).enumerate() {
            let a = a.row(k)[j];
            for (b, (out, scale)) in row.iter_mut().zip(scale).enumerate() {
                *out = scale * a * g.row(b)[j];
            }
        }
    });
}

pub(super) fn add_scale_gradient(
    d_scale: &mut [f32],
    alpha: f32,
    d: Rows<'_, f32>,
    a: Rows<'_, f32>,
    g: Rows<'_, f32>,
) {
    let b = g.rows().max(1);
    let parts = d_scale.par_chunks_mut(b).enumerate();
    parts.for_each(|(k, d_scale)| {
        let mut sums = vec![0.0_f64; d_scale.len()];
        for (j, a) in a.row(k).iter().enumerate() {
            let d = &d.row(j)[k * b..];
            for (b, (sum, d)) in sums.iter_mut().zip(d).enumerate() {
                *sum += f64::from(d * a * g.row(b)[j]);
            }
        }
        for (d_scale, sum) in d_scale.iter_mut().zip(sums) {
            *d_scale += alpha * sum as f32;
        }
    });
}

pub(super) fn add_second_gradient(
    mut d_g: RowsMut<'_, f32>,
    alpha: f32,
    d: Rows<'_, f32>,
    a: Rows<'_, f32>,
    scale: &[f32],
) {
    let count = d_g.rows();
    d_g.par_rows_mut().enumerate().for_each(|(b, row)| {
        for (j, d_g) in row.iter_mut().enumerate() {
            let places = (b..).step_by(count);
            let terms = (0..a.rows()).zip(places);
            let sum: f64 = terms
                .map(|(k, place)| f64::from(d.row(j)[place] * scale[place] * a.row(k)[j]))
                .sum();
            *d_g += alpha * sum as f32;
        }
    });
}
