//! CorDA: the directions of a weight that matter most, or least, to what goes through it.
//!
//! With C the mean of `X^T X` over documents, each scaled by its largest element, and damped: `W C = U S V^T`,
//! `A = √(S/scale) V^T C^-1` and `B = U √(S/scale)`, of the largest singular values (`ipm`, to learn a new
//! task) or the smallest (`kpm`, to keep what the documents ask for).
//!
//! # Source
//! Yang et al.: "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models" (2024); PEFT's
//! `corda.py`.

use super::start::Factors;
use crate::method::Keys;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::decompose::{Matrix, Svd};
use ferrotune_kernels::{DType, Tensor, View, matmul};
use serde_json::{Value, json};

/// Which directions are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CordaMethod {
    /// `ipm`, instruction-previewed: those that matter most to the documents.
    #[default]
    Ipm,
    /// `kpm`, knowledge-preserving: those that matter least.
    Kpm,
}

impl CordaMethod {
    pub(super) fn read(keys: &mut Keys<'_>) -> Result<Self> {
        for file in ["cache_file", "covariance_file"] {
            if keys.get(file).is_some() && keys.directory().is_none() {
                let message = "is a pickle of PEFT's, which is never read here; the statistics are gathered anew";
                return Err(keys.error(file, message));
            }
        }
        keys.ignore(&[
            "prune_temporary_fields",
            "use_float16_for_covariance",
            "verbose",
        ]);
        Ok(match keys.choice("corda_method", &["ipm", "kpm"])? {
            "kpm" => Self::Kpm,
            _ => Self::Ipm,
        })
    }

    pub(super) fn to_value(self) -> Value {
        let name = match self {
            Self::Ipm => "ipm",
            Self::Kpm => "kpm",
        };
        json!({"corda_method": name})
    }
}

/// The sum of `X^T X` over documents, and how many there were.
#[derive(Debug)]
pub(super) struct Covariance {
    sum: Tensor,
    documents: usize,
}

impl Covariance {
    pub(super) fn new(features: usize) -> Self {
        Self {
            sum: Tensor::zeros(DType::F32, features, features),
            documents: 0,
        }
    }

    /// Adds a document `[t, in]`.
    pub(super) fn add(&mut self, x: View<'_>) -> Result<()> {
        let mut values = x.to_f32_vec();
        let largest = values
            .iter()
            .copied()
            .fold(f32::NEG_INFINITY, f32::max)
            .abs();
        values.iter_mut().for_each(|v| *v /= largest);
        if values.iter().any(|v| !v.is_finite()) {
            let message = "corda: an input of a linear is zero or not finite all over a document";
            return Err(Error::Numeric {
                message: message.into(),
            });
        }
        let x = View::from_f32(&values, x.rows(), x.cols());
        matmul::tn(self.sum.view_mut(), 1.0, 1.0, x, x)?;
        self.documents += 1;
        Ok(())
    }

    fn mean(&self) -> Matrix {
        let mut mean = Matrix::of(self.sum.view());
        let count = self.documents.max(1) as f64;
        mean.values_mut().iter_mut().for_each(|v| *v /= count);
        mean
    }
}

/// A and B of a weight `[out, in]` over inputs of this covariance.
pub(super) fn factors(
    weight: View<'_>,
    covariance: &Covariance,
    [rank, scale]: [f64; 2],
    method: CordaMethod,
) -> Result<Factors> {
    let (damped, inverse) = damped(&covariance.mean())?;
    let Svd { u, s, vt } = Matrix::of(weight).times(&damped)?.svd()?;
    let (rank, all) = (rank as usize, s.len());
    let range = match method {
        CordaMethod::Ipm => 0..rank,
        CordaMethod::Kpm => all - rank..all,
    };
    let Svd { u, s, vt } = Svd { u, s, vt }.range(range);
    let roots: Vec<f64> = s.iter().map(|s| (s / scale).sqrt()).collect();
    Ok(Factors {
        a: vt.times(&inverse)?.rows_scaled(&roots).to_f32_vec(),
        b: u.columns_scaled(&roots).to_f32_vec(),
    })
}

/// C with its diagonal raised until it can be inverted, and the inverse.
fn damped(covariance: &Matrix) -> Result<(Matrix, Matrix)> {
    const MOST: f64 = 0.05;
    let n = covariance.shape()[0];
    let mean = (0..n)
        .map(|i| covariance.values()[i * (n + 1)])
        .sum::<f64>()
        / n.max(1) as f64;
    let mut damp = 0.01;
    loop {
        let mut damped = covariance.clone();
        for value in damped.values_mut().iter_mut().step_by(n + 1) {
            *value += mean * damp;
        }
        let inverse = damped.inverse()?;
        let mut product = damped.times(&inverse)?;
        for value in product.values_mut().iter_mut().step_by(n + 1) {
            *value -= 1.0;
        }
        let error = product.values().iter().map(|v| v * v).sum::<f64>().sqrt();
        if error < MOST {
            return Ok((damped, inverse));
        }
        damp *= 2.0;
        if damp > 1e6 {
            let message = format!("corda: the inputs' covariance [{n}, {n}] has no inverse");
            return Err(Error::Numeric { message });
        }
    }
}
