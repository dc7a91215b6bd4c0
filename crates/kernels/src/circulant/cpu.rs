use super::Order;
use crate::{Rows, RowsMut};
use rayon::prelude::*;

pub(super) fn add(
    mut out: RowsMut<'_, f32>,
    alpha: f32,
    kernel: &[f32],
    block: usize,
    order: Order,
) {
    let cols = out.cols();
    out.par_rows_mut().enumerate().for_each(|(r, row)| {
        let i = r % block;
        let kernel = &kernel[r / block * cols..][..cols];
        for (row, kernel) in row.chunks_mut(block).zip(kernel.chunks(block)) {
            // The element of t = 0 stands at i, or at -i.
            let (before, after) = match order {
                Order::Circulant => kernel.split_at(block - i),
                Order::Reflected => kernel.split_at(i),
            };
            for (out, value) in row.iter_mut().zip(after.iter().chain(before)) {
                *out += alpha * value;
            }
        }
    });
}

pub(super) fn add_gradient(d_kernel: &mut [f32], alpha: f32, d: Rows<'_, f32>, block: usize) {
    let rows = d_kernel.par_chunks_mut(d.cols().max(1)).enumerate();
    rows.for_each(|(m, d_kernel)| {
        let mut sums = vec![0.0_f64; d_kernel.len()];
        for i in 0..block {
            let row = d.row(m * block + i);
            for (sums, row) in sums.chunks_mut(block).zip(row.chunks(block)) {
                let (before, after) = row.split_at(i);
                for (sum, d) in sums.iter_mut().zip(after.iter().chain(before)) {
                    *sum += f64::from(*d);
                }
            }
        }
        for (d_kernel, sum) in d_kernel.iter_mut().zip(sums) {
            *d_kernel += alpha * sum as f32;
        }
    });
}
