//! Floating point operations per token: of a step, and of what is computed again.

use super::StepShape;
use super::host::FLOPS_PER_BYTE;
use super::shape::{GroupShape, LayerShape, Method};
use crate::model::Keep;

/// Of a step that keeps everything: linears 2 per weight forward, 2 for the gradient of their input and
/// 2 more where they are trained; low-rank updates 6; attention over rows of S tokens 7 S H E, of which
/// 2 are forward; the head 4 per weight and label row.
pub(super) fn step(shape: &StepShape) -> f64 {
    let layers =
        (shape.layers.iter()).map(|layer| passes(shape, layer, Keep::All).into_iter().sum::<f64>());
    let head = 4.0 * (shape.vocabulary * shape.hidden) as f64 * shape.label_share;
    layers.sum::<f64>() + head
}

/// Of the backward of `layer`, beyond what it costs when everything is kept.
pub(super) fn again(shape: &StepShape, layer: &LayerShape, keep: Keep) -> f64 {
    match keep {
        Keep::All => 0.0,
        Keep::DropGateUp => forward(&layer.gate_up),
        Keep::Input => {
            let groups = [&layer.qkv, &layer.o, &layer.gate_up];
            let linears: f64 = groups.into_iter().map(forward).sum();
            linears + 2.0 * attention_unit(shape, layer)
        }
    }
}

/// While the stream of operations waits for what layers keep in host memory, as operations. Layer i keeps `host[i]` bytes a
/// token there, which leave during the forward of the layer above and come back during its backward.
pub(super) fn waiting(shape: &StepShape, keep: impl Fn(usize) -> Keep, host: &[u64]) -> f64 {
    let waits = host.iter().enumerate().map(|(i, &bytes)| {
        let moving = bytes as f64 * FLOPS_PER_BYTE;
        let [forward, backward] = match shape.layers.get(i + 1) {
            Some(above) => passes(shape, above, keep(i + 1)),
            None => [0.0; 2],
        };
        (moving - forward).max(0.0) + (moving - backward).max(0.0)
    });
    waits.sum()
}

/// Forward and backward of `layer`.
fn passes(shape: &StepShape, layer: &LayerShape, keep: Keep) -> [f64; 2] {
    let groups = [&layer.qkv, &layer.o, &layer.gate_up, &layer.down];
    let attention = attention_unit(shape, layer);
    let forward = groups.into_iter().map(forward).sum::<f64>() + 2.0 * attention;
    let step = groups.into_iter().map(linears_of_step).sum::<f64>() + 7.0 * attention;
    [forward, step - forward + again(shape, layer, keep)]
}

/// S H E, with S the mean number of tokens of a document.
fn attention_unit(shape: &StepShape, layer: &LayerShape) -> f64 {
    shape.mean_length * layer.o.in_features as f64
}

fn forward(group: &GroupShape) -> f64 {
    let parts = group.parts.iter().map(|part| {
        let weight = part.in_features * part.out_features;
        let low_rank = match part.method {
            Method::LowRank { rank, .. } => rank * (part.in_features + part.out_features),
            _ => 0,
        };
        2.0 * (weight + low_rank) as f64
    });
    parts.sum()
}

fn linears_of_step(group: &GroupShape) -> f64 {
    let parts = group.parts.iter().map(|part| {
        let weight = (part.in_features * part.out_features) as f64;
        match part.method {
            Method::Frozen | Method::TrainBias | Method::Changed { .. } | Method::Custom { .. } => {
                4.0 * weight
            }
            Method::TrainBase => 6.0 * weight,
            Method::LowRank { rank, .. } => {
                4.0 * weight + 6.0 * (rank * (part.in_features + part.out_features)) as f64
            }
        }
    });
    parts.sum()
}
