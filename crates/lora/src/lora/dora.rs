//! How DoRA's magnitudes start: at the norms they replace, so that the model is that of the LoRA.
//!
//! # Source
//! Liu et al.: "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024); PEFT's `DoraLinearLayer`.

use super::LoraConfig;
use super::names::{self, Part};
use ferrotune_core::adapter::BaseWeights;
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{View, matmul};

/// Sets every magnitude to the norm of its row of W + scale * B A.
pub(super) fn start(
    config: &LoraConfig,
    params: &mut FlatBuffer,
    base: &dyn BaseWeights,
) -> Result<()> {
    let layout = params.layout().clone();
    let missing =
        |module: &str| Error::config("use_dora", format!("`{module}` is no linear of the base"));
    for (id, segment) in layout.by_name() {
        let Some((module, Part::Magnitude)) = names::parse(&segment.spec.name) else {
            continue;
        };
        let site = base.find(module).ok_or_else(|| missing(module))?;
        let mut weight = base.read(site)?;
        let factor = |part| {
            let found = layout.find(&names::tensor(module, part));
            found.ok_or_else(|| missing(module))
        };
        let [a, b] = [factor(Part::A)?, factor(Part::B)?];
        let [out, inputs] = [weight.rows(), weight.cols()];
        let rank = layout.segment(a).spec.len() / inputs.max(1);
        let values = config.rank_and_alpha().alpha_of(module)?;
        matmul::nn(
            weight.view_mut(),
            1.0,
            config.scale(rank, values),
            View::from_f32(params.get(b), out, rank),
            View::from_f32(params.get(a), rank, inputs),
        )?;
        let rows = weight.to_f32_vec();
        let norms = rows.chunks_exact(inputs.max(1)).map(|row| {
            let squares = row.iter().map(|w| f64::from(*w).powi(2));
            squares.sum::<f64>().sqrt() as f32
        });
        let norms: Vec<f32> = norms.collect();
        params.get_mut(id).copy_from_slice(&norms);
    }
    Ok(())
}
