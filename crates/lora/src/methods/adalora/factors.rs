//! The update of one linear, and the term of the loss that keeps its vectors orthogonal.

use super::super::matrix::{self, elements};
use crate::method::Target;
use ferrotune_core::Result;
use ferrotune_core::adapter::LowRankFactors;
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Tensor, View, matmul};

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
        let [out, rank, inputs] = self.shape;
        let rows = params.get(self.a).chunks_exact(inputs);
        let scaled = rows
            .zip(params.get(self.e))
            .flat_map(|(row, e)| row.iter().map(move |a| a * e));
        Ok([
            Tensor::from_f32(scaled.collect::<Vec<f32>>(), rank, inputs),
            Tensor::from_f32(params.get(self.b).to_vec(), out, rank),
        ])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_a: View<'_>,
        d_b: View<'_>,
    ) -> Result<()> {
        let inputs = self.shape[2];
        let d_scaled = elements(d_a);
        let rows = || d_scaled.chunks_exact(inputs);
        let of_a = grads.get_mut(self.a).chunks_exact_mut(inputs);
        for ((d_a, d), e) in of_a.zip(rows()).zip(params.get(self.e)) {
            d_a.iter_mut().zip(d).for_each(|(d_a, d)| *d_a += d * e);
        }
        let a = params.get(self.a).chunks_exact(inputs);
        for ((d_e, d), a) in grads.get_mut(self.e).iter_mut().zip(rows()).zip(a) {
            *d_e += d.iter().zip(a).map(|(d, a)| d * a).sum::<f32>();
        }
        matrix::add(grads.get_mut(self.b), &elements(d_b));
        Ok(())
    }
}

/// |A A^T - I| + |B^T B - I| of one module; adds `weight` times the gradient to `grads`.
pub(super) fn orthogonality(
    target: &Target,
    rank: usize,
    params: &FlatBuffer,
    weight: f32,
    grads: &mut FlatBuffer,
) -> Result<f64> {
    let (a, b) = (target.ids[0], target.ids[1]);
    let (inputs, out) = (target.site.in_features, target.site.out_features);
    let mut gram = Tensor::zeros(DType::F32, rank, rank);
    let vectors = matrix::param(params, a, rank, inputs);
    matmul::nt(gram.view_mut(), 0.0, 1.0, vectors, vectors)?;
    let (of_a, gram) = away_from_identity(&gram);
    let d = matrix::grad(grads, a, rank, inputs);
    matmul::nn(d, 1.0, slope(of_a, weight), gram.view(), vectors)?;

    let vectors = matrix::param(params, b, out, rank);
    let (of_b, gram) = away_from_identity(&matrix::tn(vectors, vectors)?);
    let d = matrix::grad(grads, b, out, rank);
    matmul::nn(d, 1.0, slope(of_b, weight), vectors, gram.view())?;
    Ok(of_a + of_b)
}

/// `G - I` and its norm.
fn away_from_identity(gram: &Tensor) -> (f64, Tensor) {
    let [rows, cols] = gram.view().shape();
    let mut values = elements(gram.view());
    for i in 0..rows {
        values[i * cols + i] -= 1.0;
    }
    let norm = values
        .iter()
        .map(|&v| f64::from(v) * f64::from(v))
        .sum::<f64>()
        .sqrt();
    (norm, Tensor::from_f32(values, rows, cols))
}

/// d|M M^T - I| = 2 (M M^T - I) M / |M M^T - I|; none where the norm has a corner.
fn slope(norm: f64, weight: f32) -> f32 {
    if norm > 0.0 {
        (2.0 * f64::from(weight) / norm) as f32
    } else {
        0.0
    }
}
