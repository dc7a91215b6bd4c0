//! An update of a base that its start changed, as a plain LoRA of the base itself.
//!
//! ```text
//! W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]
//! ```
//!
//! so the rank is twice that of the run, and alpha such that s stays. The same holds with DoRA, whose norms are
//! those of that sum.
//!
//! # Source
//! PEFT's `subtract_mutated_init`, which loses everything but A and B, and gets `rank_pattern` and
//! `alpha_pattern` wrong beside `use_rslora`.

use super::init::rank_dimension;
use super::{InitLoraWeights, LoraConfig, Start};
use ferrotune_core::Result;
use ferrotune_core::params::{FlatBuffer, ParamLayout, ParamLayoutBuilder};
use std::sync::Arc;

/// The configuration of the plain LoRA.
pub(super) fn config(of: &LoraConfig) -> LoraConfig {
    let factor = if of.use_rslora {
        std::f64::consts::SQRT_2
    } else {
        2.0
    };
    let ranks = of.rank_pattern.iter();
    let alphas = of.alpha_pattern.iter();
    LoraConfig {
        rank: 2 * of.rank,
        alpha: factor * of.alpha,
        rank_pattern: ranks.map(|(name, rank)| (name.clone(), 2 * rank)).collect(),
        alpha_pattern: alphas
            .map(|(name, alpha)| (name.clone(), factor * alpha))
            .collect(),
        init_lora_weights: InitLoraWeights::Kaiming,
        ..of.clone()
    }
}

/// The layout of the plain LoRA.
pub(super) fn layout(of: &ParamLayout) -> Result<Arc<ParamLayout>> {
    let mut builder = ParamLayoutBuilder::new();
    for (_, segment) in of.by_name() {
        let mut spec = segment.spec.clone();
        if let Some(rank) = rank_dimension(&spec.name) {
            spec.shape[rank] *= 2;
        }
        builder.add(spec);
    }
    builder.build()
}

/// The tensors of the plain LoRA.
pub(super) fn join(params: &FlatBuffer, start: &Start) -> Result<FlatBuffer> {
    let mut plain = FlatBuffer::zeros(&layout(params.layout())?);
    for (id, segment) in params.layout().by_name() {
        let values = params.get(id);
        let joined: Vec<f32> = match rank_dimension(&segment.spec.name) {
            None => values.to_vec(),
            Some(0) => [values, start.values_of(&segment.spec)?].concat(),
            Some(_) => {
                let rank = segment.spec.shape[1].max(1);
                let rows = values
                    .chunks(rank)
                    .zip(start.values_of(&segment.spec)?.chunks(rank));
                let row = |(b, b0): (&[f32], &[f32])| -> Vec<f32> {
                    b.iter().copied().chain(b0.iter().map(|v| -v)).collect()
                };
                rows.flat_map(row).collect()
            }
        };
        if let Some(id) = plain.layout().find(&segment.spec.name) {
            plain.get_mut(id).copy_from_slice(&joined);
        }
    }
    Ok(plain)
}

/// The opposite of [`join`]: fills `params`, and returns what they started from.
pub(super) fn split(plain: &FlatBuffer, params: &mut FlatBuffer) -> Result<Start> {
    let layout = Arc::clone(params.layout());
    let mut first = FlatBuffer::zeros(Start::zeros(&layout)?.factors().layout());
    for (id, segment) in layout.by_name() {
        let name = &segment.spec.name;
        let Some(values) = plain.layout().find(name).map(|id| plain.get(id)) else {
            continue;
        };
        let of_start = first.layout().find(name);
        let (now, then): (Vec<f32>, Vec<f32>) = match rank_dimension(&segment.spec.name) {
            None => (values.to_vec(), Vec::new()),
            Some(0) => {
                let (now, then) = values.split_at(segment.spec.len());
                (now.to_vec(), then.to_vec())
            }
            Some(_) => {
                let rank = segment.spec.shape[1].max(1);
                let rows = values.chunks(2 * rank).map(|row| row.split_at(rank));
                let (now, then): (Vec<&[f32]>, Vec<&[f32]>) = rows.unzip();
                (now.concat(), then.concat().iter().map(|v| -v).collect())
            }
        };
        params.get_mut(id).copy_from_slice(&now);
        if let Some(id) = of_start {
            first.get_mut(id).copy_from_slice(&then);
        }
    }
    Ok(Start::new(first))
}
