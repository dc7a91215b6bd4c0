use super::{Along, Composition};
use crate::{Rows, RowsMut};
use rayon::prelude::*;

/// The vectors of every piece, and their weights.
pub(super) struct Chosen {
    all: Vec<(usize, f32)>,
    topk: usize,
}

impl Chosen {
    pub(super) fn of(logits: &[f32], vectors: usize, topk: usize) -> Self {
        let pieces = logits.par_chunks_exact(vectors);
        let all: Vec<Vec<(usize, f32)>> = pieces.map(|logits| choose(logits, topk)).collect();
        let all = all.into_iter().flatten().collect();
        Self { all, topk }
    }

    fn piece(&self, p: usize) -> &[(usize, f32)] {
        &self.all[p * self.topk..(p + 1) * self.topk]
    }
}

fn choose(logits: &[f32], topk: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(topk);
    let largest = order.first().map_or(0.0, |&i| logits[i]);
    let weights: Vec<f32> = order.iter().map(|&i| (logits[i] - largest).exp()).collect();
    let total: f32 = weights.iter().sum();
    let weights = weights.into_iter().map(|weight| weight / total);
    order.into_iter().zip(weights).collect()
}

/// Where pieces stand.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    along: Along,
    length: usize,
    /// Pieces side by side.
    across: usize,
}

impl Layout {
    pub(super) fn new(of: Composition<'_>, cols: usize) -> Self {
        Self {
            along: of.along,
            length: of.bank.cols(),
            across: of.pieces_across(cols),
        }
    }

    /// Row and column of element `e` of piece `p`.
    fn place(self, p: usize, e: usize) -> [usize; 2] {
        let [row, column] = [p / self.across, p % self.across];
        match self.along {
            Along::Rows => [row, column * self.length + e],
            Along::Columns => [row * self.length + e, column],
        }
    }

    /// The piece and the element at a place.
    fn element(self, row: usize, column: usize) -> [usize; 2] {
        match self.along {
            Along::Rows => [
                row * self.across + column / self.length,
                column % self.length,
            ],
            Along::Columns => [row / self.length * self.across + column, row % self.length],
        }
    }

    fn piece_of(self, d: Rows<'_, f32>, p: usize) -> Vec<f32> {
        let at = |e| {
            let [row, column] = self.place(p, e);
            d.row(row)[column]
        };
        (0..self.length).map(at).collect()
    }
}

pub(super) fn compose(mut out: RowsMut<'_, f32>, chosen: &Chosen, bank: &[f32], layout: Layout) {
    out.par_rows_mut().enumerate().for_each(|(row, values)| {
        for (column, value) in values.iter_mut().enumerate() {
            let [p, e] = layout.element(row, column);
            let terms = chosen.piece(p).iter();
            *value = terms
                .map(|(v, weight)| weight * bank[v * layout.length + e])
                .sum();
        }
    });
}

pub(super) fn add_logits_gradient(
    d_logits: &mut [f32],
    d: Rows<'_, f32>,
    chosen: &Chosen,
    bank: &[f32],
    layout: Layout,
) {
    let (length, vectors) = (layout.length, bank.len() / layout.length);
    let pieces = d_logits.par_chunks_exact_mut(vectors).enumerate();
    pieces.for_each(|(p, d_logits)| {
        let (piece, chosen) = (layout.piece_of(d, p), chosen.piece(p));
        let dot = |v: usize| -> f64 {
            let terms = piece.iter().zip(&bank[v * length..(v + 1) * length]);
            terms.map(|(d, b)| f64::from(*d) * f64::from(*b)).sum()
        };
        let dots: Vec<f64> = chosen.iter().map(|(v, _)| dot(*v)).collect();
        let pairs = || chosen.iter().zip(&dots);
        let mean: f64 = pairs().map(|((_, w), dot)| f64::from(*w) * dot).sum();
        for ((v, weight), dot) in pairs() {
            d_logits[*v] += weight * (dot - mean) as f32;
        }
    });
}

pub(super) fn add_bank_gradient(
    d_bank: &mut [f32],
    d: Rows<'_, f32>,
    chosen: &Chosen,
    layout: Layout,
) {
    let vectors = d_bank.par_chunks_exact_mut(layout.length).enumerate();
    vectors.for_each(|(vector, to)| {
        let mut sums = vec![0.0_f64; layout.length];
        for (at, (v, weight)) in chosen.all.iter().enumerate() {
            if *v == vector {
                let piece = layout.piece_of(d, at / chosen.topk);
                for (sum, d) in sums.iter_mut().zip(&piece) {
                    *sum += f64::from(*weight) * f64::from(*d);
                }
            }
        }
        to.iter_mut()
            .zip(sums)
            .for_each(|(to, sum)| *to += sum as f32);
    });
}
