//! How DoRA's magnitudes start: at the norms they replace, so that the model is that of the LoRA.
//!
//! # Source
//! Liu et al.: "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024); PEFT's `DoraLinearLayer` and
//! `DoraEmbeddingLayer`.

use super::LoraConfig;
use crate::names::{self, Part};
use ferrotune_core::adapter::BaseWeights;
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{View, matmul};

/// Sets every magnitude to the norm of its row of W + scale * B A, or of its column where W is a table.
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
        let of_table = layout.find(&names::tensor(module, Part::A)).is_none();
        let [a, b] = match of_table {
            true => [Part::EmbeddingB, Part::EmbeddingA],
            false => [Part::A, Part::B],
        };
        let [a, b] = [factor(a)?, factor(b)?];
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
        let norms = norms(&weight.to_f32_vec(), inputs, of_table);
        params.get_mut(id).copy_from_slice(&norms);
    }
    Ok(())
}

/// Norms of the columns, or of the rows, of a matrix whose rows have `width` values.
fn norms(values: &[f32], width: usize, of_columns: bool) -> Vec<f32> {
    let rows = values.chunks_exact(width.max(1));
    let squares = |row: &[f32]| -> Vec<f64> { row.iter().map(|w| f64::from(*w).powi(2)).collect() };
    let sums: Vec<f64> = if of_columns {
        let mut sums = vec![0.0; width];
        for row in rows {
            sums.iter_mut()
                .zip(squares(row))
                .for_each(|(sum, square)| *sum += square);
        }
        sums
    } else {
        rows.map(|row| squares(row).iter().sum()).collect()
    };
    sums.iter().map(|sum| sum.sqrt() as f32).collect()
}
