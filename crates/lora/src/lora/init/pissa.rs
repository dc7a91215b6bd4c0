//! PiSSA: the principal singular values and vectors are trained, the rest of the weight is the base.
//!
//! `W = U S V^T`; with the leading `rank` of them `A = √(S/scale) V^T` and `B = U √(S/scale)`.
//!
//! # Source
//! Meng, Wang, Zhang: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
//! Models" (2024); PEFT's `pissa_init`.

use super::start::Factors;
use ferrotune_core::Result;
use ferrotune_kernels::View;
use ferrotune_kernels::decompose::{Matrix, Svd};
use ferrotune_kernels::rng::Stream;

/// A and B of a weight `[out, in]`, exact or by so many rounds of subspace iteration.
pub(super) fn factors(
    weight: View<'_>,
    rank: usize,
    scale: f32,
    iterations: Option<(u32, Stream)>,
) -> Result<Factors> {
    let weight = Matrix::of(weight);
    let svd = match iterations {
        None => weight.svd()?.range(0..rank),
        Some((iterations, stream)) => weight.svd_low_rank(rank, iterations, stream)?,
    };
    Ok(of_svd(svd, scale))
}

/// `√(S/scale) V^T` and `U √(S/scale)`.
pub(super) fn of_svd(svd: Svd, scale: f32) -> Factors {
    let root = |s: &f64| (s / f64::from(scale)).sqrt();
    let roots: Vec<f64> = svd.s.iter().map(root).collect();
    Factors {
        a: svd.vt.rows_scaled(&roots).to_f32_vec(),
        b: svd.u.columns_scaled(&roots).to_f32_vec(),
    }
}
