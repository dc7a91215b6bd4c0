//! Random starts: pure functions of the seed and the parameter's name.

use super::InitLoraWeights;
use crate::names::{self, Part};
use ferrotune_core::params::{FlatBuffer, ParamId, Segment};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::rng::{Stream, key_for};
use rayon::prelude::*;

/// Fills every factor of an update in `params`, as [`InitLoraWeights::Kaiming`] where the start follows from
/// something else and comes later; what starts from the base's values keeps them.
///
/// # Errors
/// [`Error::Config`] for [`InitLoraWeights::Orthogonal`] with an odd rank.
///
/// # Source
/// PEFT's `reset_lora_parameters` and `orthogonal_init`, as distributions; the numbers come from our own
/// generator.
pub(in super::super) fn fill(
    params: &mut FlatBuffer,
    init: InitLoraWeights,
    seed: u64,
) -> Result<()> {
    let layout = params.layout().clone();
    let values: Vec<(ParamId, Vec<f32>)> = layout
        .by_name()
        .collect::<Vec<_>>()
        .into_par_iter()
        .filter_map(|(id, segment)| {
            let (module, part) = names::parse(&segment.spec.name)?;
            let stream = Stream::new(key_for(seed, &segment.spec.name));
            let values = match (part, init) {
                (Part::A | Part::B, InitLoraWeights::Orthogonal) => {
                    let basis = Stream::new(key_for(seed, &names::tensor(module, Part::A)));
                    orthogonal(part, segment, basis, stream)
                }
                (Part::BiasOfB, InitLoraWeights::Random) => {
                    // As PyTorch bounds the bias of a linear: by the width of its input, the rank.
                    let b = layout.find(&names::tensor(module, Part::B))?;
                    let rank = layout.segment(b).spec.shape[1];
                    Ok(uniform(segment.spec.len(), rank, stream))
                }
                _ => draw(init, part, segment, stream).map(Ok)?,
            };
            Some(values.map(|values| (id, values)))
        })
        .collect::<Result<_>>()?;
    for (id, values) in values {
        params.get_mut(id).copy_from_slice(&values);
    }
    Ok(())
}

/// Initial values of a factor, in the run's layout.
fn draw(
    init: InitLoraWeights,
    part: Part,
    segment: &Segment,
    mut stream: Stream,
) -> Option<Vec<f32>> {
    let (len, shape) = (segment.spec.len(), &segment.spec.shape);
    let fan_in = shape.last().copied().unwrap_or(0);
    let random = init == InitLoraWeights::Random;
    Some(match part {
        Part::A if init == InitLoraWeights::Gaussian => {
            let rank = shape[0] as f64;
            (0..len).map(|_| (stream.normal() / rank) as f32).collect()
        }
        Part::A => uniform(len, fan_in, stream),
        Part::B if random => uniform(len, fan_in, stream),
        Part::B | Part::BiasOfB => vec![0.0; len],
        Part::EmbeddingB => (0..len).map(|_| stream.normal() as f32).collect(),
        Part::EmbeddingA if random => (0..len).map(|_| stream.normal() as f32).collect(),
        Part::EmbeddingA => vec![0.0; len],
        _ => return None,
    })
}

/// Uniform within ±1/√fan_in.
fn uniform(len: usize, fan_in: usize, mut stream: Stream) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f64).sqrt();
    let mut draw = || ((2.0 * stream.uniform() - 1.0) * bound) as f32;
    (0..len).map(|_| draw()).collect()
}

/// A `[rank, in]` from the even rows, or B `[out, rank]` from the odd rows, of a random orthogonal matrix
/// `[rank, rank]`, which `basis` draws for both: `A = (X Q_even)^T / 10`, `B = Y^T Q_odd / 10`.
fn orthogonal(
    part: Part,
    segment: &Segment,
    basis: Stream,
    mut stream: Stream,
) -> Result<Vec<f32>> {
    let is_a = part == Part::A;
    let [rows, cols] = [segment.spec.shape[0], segment.spec.shape[1]];
    let (rank, features) = if is_a { (rows, cols) } else { (cols, rows) };
    if !rank.is_multiple_of(2) {
        return Err(Error::config(
            "init_lora_weights",
            format!(
                "`orthogonal` needs even ranks, and {rank} is odd; take {}",
                rank + 1
            ),
        ));
    }
    let q = orthonormal_rows(rank, basis);
    let first = usize::from(!is_a);
    let mut product = vec![0.0_f32; features * rank];
    for feature in 0..features {
        let weights: Vec<f64> = (0..rank / 2).map(|_| stream.normal()).collect();
        for r in 0..rank {
            let sum: f64 = (weights.iter().enumerate())
                .map(|(i, weight)| weight * q[(2 * i + first) * rank + r])
                .sum();
            let at = if is_a {
                r * features + feature
            } else {
                feature * rank + r
            };
            product[at] = (sum / 10.0) as f32;
        }
    }
    Ok(product)
}

/// A random orthogonal matrix, row after row: Gram and Schmidt, twice, on normal draws.
fn orthonormal_rows(rank: usize, mut stream: Stream) -> Vec<f64> {
    let mut rows = vec![0.0; rank * rank];
    for r in 0..rank {
        let (before, row) = rows.split_at_mut(r * rank);
        let row = &mut row[..rank];
        row.iter_mut().for_each(|value| *value = stream.normal());
        for _ in 0..2 {
            for other in before.chunks(rank) {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.iter_mut().for_each(|value| *value /= norm);
        }
    }
    rows
}
