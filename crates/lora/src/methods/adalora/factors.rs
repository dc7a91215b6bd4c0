//! The update of one linear, and the term of the loss that keeps its vectors orthogonal.

use super::super::matrix::{self, grad, param};
use crate::method::Target;
use ferrotune_core::Result;
use ferrotune_core::adapter::LowRankFactors;
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{Tensor, View, ViewMut, axpby, hadamard, identity_distance, matmul};

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

/// Adds to `grads` `weight` times the gradient of |A A^T - I| + |B^T B - I| of one module, over the vectors it has: a rank
/// that was cut before has vectors of zeros and counts for nothing, as PEFT has none there. Both go to `distances [1, 2]`.
pub(super) fn orthogonality(
    target: &Target,
    rank: usize,
    params: &FlatBuffer,
    weight: f32,
    grads: &mut FlatBuffer,
    distances: ViewMut<'_>,
) -> Result<()> {
    let (a, b) = (target.ids[0], target.ids[1]);
    let (inputs, out) = (target.site.in_features, target.site.out_features);
    let [of_a, of_b] = distances.split_columns(1);
    let vectors = param(params, a, [rank, inputs], params.home());
    let mut gram = matrix::empty(vectors, rank, rank);
    matmul::nt(gram.view_mut(), 0.0, 1.0, vectors, vectors)?;
    identity_distance::direction(gram.view_mut(), of_a)?;
    let d = grad(grads, a, [rank, inputs], vectors);
    matmul::nn(d, 1.0, 2.0 * weight, gram.view(), vectors)?;

    let vectors = param(params, b, [out, rank], params.home());
    let mut gram = matrix::tn(vectors, vectors)?;
    identity_distance::direction(gram.view_mut(), of_b)?;
    let d = grad(grads, b, [out, rank], vectors);
    Ok(matmul::nn(d, 1.0, 2.0 * weight, vectors, gram.view())?)
}
