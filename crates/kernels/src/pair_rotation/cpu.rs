use super::{Pairs, Per};
use crate::row_blocks::blocks;
use crate::{Element, Rows, RowsMut};
use rayon::prelude::*;

/// Columns a task of the column sums owns.
const COLUMNS: usize = 256;

impl Pairs {
    /// The other column of the pair, and the sign of s.
    fn pair(self, i: usize) -> (usize, f32) {
        let half = self.group / 2;
        if i % self.group < half {
            (i + half, -1.0)
        } else {
            (i - half, 1.0)
        }
    }

    /// Which angles make c and s of column `i`.
    fn places(self, i: usize) -> [usize; 2] {
        let group = self.group;
        let (of, within) = (i / group, i % group);
        match self.per {
            Per::Pair => [of * (group / 2) + within % (group / 2); 2],
            Per::Column => [i; 2],
            Per::Coefficient => [2 * of * group + within, (2 * of + 1) * group + within],
        }
    }
}

/// c and s, and how they are used.
#[derive(Clone, Copy)]
pub(super) struct Coefficients<'a> {
    c: &'a [f32],
    s: &'a [f32],
    half: usize,
    transposed: bool,
}

impl<'a> Coefficients<'a> {
    pub(super) fn new(both: &'a [f32], pairs: Pairs, transposed: bool) -> Self {
        let (c, s) = both.split_at(both.len() / 2);
        Self {
            c,
            s,
            half: pairs.group / 2,
            transposed,
        }
    }

    /// Rotates the values of a pair, of which `first` is the column in the first half.
    fn turn<T: Element>(&self, first: usize, a: &mut T, b: &mut T) {
        let second = first + self.half;
        let mut s = [self.s[first], self.s[second]];
        if self.transposed {
            s.swap(0, 1);
        }
        let (x, z) = (a.to_f32(), b.to_f32());
        *a = T::from_f32(self.c[first] * x + s[0] * z);
        *b = T::from_f32(self.c[second] * z + s[1] * x);
    }
}

pub(super) fn coefficients(out: &mut [f32], theta: &[f32], alpha: &[f32], pairs: Pairs) {
    let columns = out.len() / 2;
    let (c, s) = out.split_at_mut(columns);
    for (i, (c, s)) in c.iter_mut().zip(s).enumerate() {
        let [of_c, of_s] = pairs.places(i);
        *c = alpha[of_c] * theta[of_c].cos();
        *s = pairs.pair(i).1 * alpha[of_s] * theta[of_s].sin();
    }
}

pub(super) fn rotate_columns<T: Element>(mut y: RowsMut<'_, T>, of: Coefficients<'_>) {
    blocks(&mut y).for_each(|mut rows| {
        for row in rows.rows() {
            for (group, values) in row.chunks_exact_mut(2 * of.half).enumerate() {
                let (a, b) = values.split_at_mut(of.half);
                for (k, (a, b)) in a.iter_mut().zip(b).enumerate() {
                    of.turn(2 * of.half * group + k, a, b);
                }
            }
        }
    });
}

pub(super) fn rotate_rows<T: Element>(mut y: RowsMut<'_, T>, of: Coefficients<'_>) {
    let (cols, pitch) = (y.cols(), y.pitch().max(1));
    // The last row may end with its last column.
    let groups = y.data_mut().par_chunks_mut(pitch * 2 * of.half);
    groups.enumerate().for_each(|(group, rows)| {
        let (a, b) = rows.split_at_mut(pitch * of.half);
        for (k, (a, b)) in a.chunks_mut(pitch).zip(b.chunks_mut(pitch)).enumerate() {
            for (a, b) in a[..cols].iter_mut().zip(&mut b[..cols]) {
                of.turn(2 * of.half * group + k, a, b);
            }
        }
    });
}

/// Sums over the rows of each column of d, times that of x, and times the other of its pair.
pub(super) fn column_sums<D: Element, X: Element>(
    sums: &mut [[f64; 2]],
    d: Rows<'_, D>,
    x: Rows<'_, X>,
    pairs: Pairs,
) {
    let chunks = sums.par_chunks_mut(COLUMNS).enumerate();
    chunks.for_each(|(chunk, sums)| {
        for t in 0..d.rows() {
            let (d, x) = (d.row(t), x.row(t));
            for (i, sums) in (chunk * COLUMNS..).zip(sums.iter_mut()) {
                let d = f64::from(d[i].to_f32());
                sums[0] += d * f64::from(x[i].to_f32());
                sums[1] += d * f64::from(x[pairs.pair(i).0].to_f32());
            }
        }
    });
}

/// The same of rows, over columns.
pub(super) fn row_sums<D: Element, X: Element>(
    sums: &mut [[f64; 2]],
    d: Rows<'_, D>,
    x: Rows<'_, X>,
    pairs: Pairs,
) {
    let rows = sums.par_iter_mut().enumerate();
    rows.for_each(|(i, sums)| {
        let dot = |other: usize| -> f64 {
            let terms = d.row(i).iter().zip(x.row(other));
            terms
                .map(|(d, x)| f64::from(d.to_f32()) * f64::from(x.to_f32()))
                .sum()
        };
        *sums = [dot(i), dot(pairs.pair(i).0)];
    });
}

pub(super) fn add_to_angles(
    [d_theta, d_alpha]: [&mut [f32]; 2],
    sums: &[[f64; 2]],
    [theta, alpha]: [&[f32]; 2],
    pairs: Pairs,
) {
    for (i, [own, other]) in sums.iter().enumerate() {
        let ([c, s], sign) = (pairs.places(i), pairs.pair(i).1);
        let (d_c, d_s) = (*own as f32, sign * *other as f32);
        d_theta[c] -= d_c * alpha[c] * theta[c].sin();
        d_theta[s] += d_s * alpha[s] * theta[s].cos();
        d_alpha[c] += d_c * theta[c].cos();
        d_alpha[s] += d_s * theta[s].sin();
    }
}
