//! OLoRA: B starts as orthonormal columns.
//!
//! `W = Q R`; A are the first `rank` rows of R, B the first columns of Q.
//!
//! # Source
//! Büyükakyüz: "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models" (2024); PEFT's `olora_init`,
//! which on weights that are stored as `[in, out]` takes the wrong side.

use super::start::Factors;
use ferrotune_core::Result;
use ferrotune_kernels::View;
use ferrotune_kernels::decompose::Matrix;

/// A and B of a weight `[out, in]`.
pub(super) fn factors(weight: View<'_>, rank: usize) -> Result<Factors> {
    let [q, r] = Matrix::of(weight).qr()?;
    Ok(Factors {
        a: r.row_range(0..rank).to_f32_vec(),
        b: q.columns(0..rank).to_f32_vec(),
    })
}
