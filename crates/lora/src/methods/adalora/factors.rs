//! The update of one linear, and the term of the loss that keeps its vectors orthogonal.

use super::super::matrix::{self, elements, grad, param};
use crate::method::Target;
use ferrotune_core::Result;
use ferrotune_core::adapter::LowRankFactors;
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{Tensor, View, axpby, hadamard, matmul};

/// `scale * B (A ⊙ E)`.
#[derive(Debug)]
pub(super) struct Triplets {
    a: ParamId,
    b: ParamId,
    e: ParamId,
    /// out, rank, in.
    shape: [usize; 3],
    scale: f32,
    dropout: f32,
}

impl Triplets {
    /// With the ids of A, B and E.
    pub(super) fn new(ids: &[ParamId], shape: [usize; 3], scale: f32, dropout: f32) -> Self {
        Self {
            a: ids[0],
            b: ids[1],
            e: ids[2],
            shape,
            scale,
            dropout,
        }
    }
}

impl LowRankFactors for Triplets {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn rank(&self) -> usize {
        self.shape[1]
    }

    fn scale(&self) -> f32 {
        self.scale
    }

    fn dropout(&self) -> f32 {
        self.dropout
    }

    fn factors(&self, params: &FlatBuffer) -> Result<[Tensor; 2]> {
        let [_, rank, inputs] = self.shape;
        let a = params.view(self.a);
        let mut scaled = matrix::empty(a, rank, inputs);
        let e = param(params, self.e, [rank, 1], a);
        hadamard::add(scaled.view_mut(), 0.0, 1.0, a, e)?;
        Ok([scaled, matrix::copy_of(params.view(self.b))])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_a: View<'_>,
        d_b: View<'_>,
    ) -> Result<()> {
        let [out, rank, inputs] = self.shape;
        let e = param(params, self.e, [rank, 1], d_a);
        hadamard::add(grad(grads, self.a, [rank, inputs], d_a), 1.0, 1.0, d_a, e)?;
        let a = param(params, self.a, [rank, inputs], d_a);
        hadamard::add_row_sums(grad(grads, self.e, [rank, 1], d_a), 1.0, d_a, a)?;
        Ok(axpby::add(
            1.0,
            grad(grads, self.b, [out, rank], d_b),
            1.0,
            d_b,
        )?)
    }
}

/// |A A^T - I| + |B^T B - I| of one module, over the vectors it has; adds `weight` times the gradient to `grads`.
pub(super) fn orthogonality(
    target: &Target,
    rank: usize,
    params: &FlatBuffer,
    weight: f32,
    grads: &mut FlatBuffer,
) -> Result<f64> {
    let (a, b) = (target.ids[0], target.ids[1]);
    let (inputs, out) = (target.site.in_features, target.site.out_features);
    let vectors = param(params, a, [rank, inputs], params.home());
    let mut gram = matrix::empty(vectors, rank, rank);
    matmul::nt(gram.view_mut(), 0.0, 1.0, vectors, vectors)?;
    let (of_a, gram) = away_from_identity(&gram);
    let d = grad(grads, a, [rank, inputs], vectors);
    matmul::nn(d, 1.0, slope(of_a, weight), gram.view(), vectors)?;

    let vectors = param(params, b, [out, rank], params.home());
    let (of_b, gram) = away_from_identity(&matrix::tn(vectors, vectors)?);
    let d = grad(grads, b, [out, rank], vectors);
    matmul::nn(d, 1.0, slope(of_b, weight), vectors, gram.view())?;
    Ok(of_a + of_b)
}

/// `G - I` and its norm. A rank that was cut before has vectors of zeros, and counts for nothing: PEFT has none there.
fn away_from_identity(gram: &Tensor) -> (f64, Tensor) {
    let [rows, cols] = gram.view().shape();
    let mut values = elements(gram.view());
    let on_diagonal = values.iter_mut().step_by(cols + 1).take(rows);
    on_diagonal
        .filter(|square| **square > 0.0)
        .for_each(|square| *square -= 1.0);
    let norm = values
        .iter()
        .map(|&v| f64::from(v) * f64::from(v))
        .sum::<f64>()
        .sqrt();
    let away = Tensor::from_f32(values, rows, cols);
    (norm, away.to_device(&gram.device()))
}

/// d|M M^T - I| = 2 (M M^T - I) M / |M M^T - I|; none where the norm has a corner.
fn slope(norm: f64, weight: f32) -> f32 {
    if norm > 0.0 {
        (2.0 * f64::from(weight) / norm) as f32
    } else {
        0.0
    }
}
