use crate::{Rows, RowsMut};
use rayon::prelude::*;

/// How the product lies in blocks.
pub(super) struct Blocks {
    /// Of the product.
    rows: usize,
    cols: usize,
    /// Of a block.
    p: usize,
    q: usize,
    transposed: bool,
}

impl Blocks {
    pub(super) fn new([rows, cols]: [usize; 2], [p, q]: [usize; 2], transposed: bool) -> Self {
        Self {
            rows,
            cols,
            p,
            q,
            transposed,
        }
    }

    /// Blocks in a row of blocks.
    fn across(&self) -> usize {
        self.cols.div_ceil(self.q.max(1))
    }

    /// Where b's element is stored.
    fn place(&self, x: usize, y: usize) -> usize {
        if self.transposed {
            y * self.p + x
        } else {
            x * self.q + y
        }
    }

    /// Row `x` of b.
    fn row(&self, b: &[f32], x: usize) -> Vec<f32> {
        (0..self.q).map(|y| b[self.place(x, y)]).collect()
    }
}

pub(super) fn add(mut out: RowsMut<'_, f32>, alpha: f32, a: &[f32], b: &[f32], of: &Blocks) {
    let across = of.across();
    out.par_rows_mut().enumerate().for_each(|(r, row)| {
        let b = of.row(b, r % of.p);
        let a = &a[r / of.p * across..][..across];
        for (block, a) in row.chunks_mut(of.q.max(1)).zip(a) {
            let factor = alpha * a;
            for (out, b) in block.iter_mut().zip(&b) {
                *out += factor * b;
            }
        }
    });
}

pub(super) fn add_first_gradient(
    d_a: &mut [f32],
    alpha: f32,
    d: Rows<'_, f32>,
    b: &[f32],
    of: &Blocks,
) {
    let across = of.across();
    let blocks = d_a.par_chunks_mut(across.max(1)).enumerate();
    blocks.for_each(|(i, d_a)| {
        let mut sums = vec![0.0_f64; across];
        for r in i * of.p..((i + 1) * of.p).min(of.rows) {
            let b = of.row(b, r % of.p);
            for (sum, d) in sums.iter_mut().zip(d.row(r).chunks(of.q.max(1))) {
                let terms = d.iter().zip(&b);
                *sum += terms.map(|(d, b)| f64::from(d * b)).sum::<f64>();
            }
        }
        for (d_a, sum) in d_a.iter_mut().zip(sums) {
            *d_a += alpha * sum as f32;
        }
    });
}

pub(super) fn add_second_gradient(
    d_b: &mut [f32],
    alpha: f32,
    d: Rows<'_, f32>,
    a: &[f32],
    of: &Blocks,
) {
    let across = of.across();
    let rows = (0..of.p).into_par_iter().map(|x| {
        let mut sums = vec![0.0_f64; of.q];
        for r in (x..of.rows).step_by(of.p.max(1)) {
            let a = &a[r / of.p * across..][..across];
            for (a, d) in a.iter().zip(d.row(r).chunks(of.q.max(1))) {
                for (sum, d) in sums.iter_mut().zip(d) {
                    *sum += f64::from(a * d);
                }
            }
        }
        sums
    });
    for (x, sums) in rows.collect::<Vec<_>>().into_iter().enumerate() {
        for (y, sum) in sums.into_iter().enumerate() {
            d_b[of.place(x, y)] += alpha * sum as f32;
        }
    }
}
