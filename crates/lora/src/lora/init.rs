//! Initial values of A and B: a pure function of the seed and the parameter's name.

use super::InitLoraWeights;
use super::names::Factor;
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::rng::{Stream, key_for};
use rayon::prelude::*;

/// Fills every LoRA tensor of `params`.
///
/// # Errors
/// [`Error::Config`] for [`InitLoraWeights::Orthogonal`].
///
/// # Source
/// PEFT's `reset_lora_parameters`, as distributions; the numbers come from our own generator.
pub(super) fn fill(params: &mut FlatBuffer, init: InitLoraWeights, seed: u64) -> Result<()> {
    if init == InitLoraWeights::Orthogonal {
        return Err(Error::config(
            "init_lora_weights",
            "`orthogonal` is not supported yet; use true, false or `gaussian`",
        ));
    }
    let layout = params.layout().clone();
    let values: Vec<(ParamId, Vec<f32>)> = layout
        .by_name()
        .collect::<Vec<_>>()
        .into_par_iter()
        .filter_map(|(id, segment)| {
            let factor = Factor::of(&segment.spec.name)?;
            let fan_in = segment.spec.shape.last().copied().unwrap_or(0);
            let stream = Stream::new(key_for(seed, &segment.spec.name));
            Some((id, draw(init, factor, fan_in, segment.spec.len(), stream)))
        })
        .collect();
    for (id, values) in values {
        params.get_mut(id).copy_from_slice(&values);
    }
    Ok(())
}

/// `len` initial values of a factor whose rows have `fan_in` elements.
fn draw(
    init: InitLoraWeights,
    factor: Factor,
    fan_in: usize,
    len: usize,
    mut stream: Stream,
) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f64).sqrt();
    let mut uniform = || ((2.0 * stream.uniform() - 1.0) * bound) as f32;
    match (factor, init) {
        (Factor::B, InitLoraWeights::Random)
        | (Factor::A, InitLoraWeights::Kaiming | InitLoraWeights::Random) => {
            (0..len).map(|_| uniform()).collect()
        }
        (Factor::A, InitLoraWeights::Gaussian | InitLoraWeights::Orthogonal) => {
            let rank = len / fan_in.max(1);
            (0..len)
                .map(|_| (stream.normal() / rank as f64) as f32)
                .collect()
        }
        (Factor::B, _) => vec![0.0; len],
    }
}
