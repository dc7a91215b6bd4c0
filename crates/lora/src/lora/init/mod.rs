//! How A and B start.
//!
//! A start is a line in [`kind`](InitLoraWeights) and a file here. Random ones follow from the seed
//! ([`random`]). The others follow from the base's weights; [`Start`] holds their factors for as long as a run
//! lasts, because the base is changed by them: `W - scale * B A`.

mod kind;
mod olora;
mod pissa;
mod random;
mod start;
#[cfg(test)]
mod tests;

pub use kind::InitLoraWeights;
pub(super) use random::fill;
pub use start::Start;
pub(super) use start::rank_dimension;

use super::LoraConfig;
use super::names::{self, Part};
use ferrotune_core::adapter::{BaseWeights, SiteId};
use ferrotune_core::params::{FlatBuffer, ParamLayout};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::Tensor;
use ferrotune_kernels::rng::{Stream, key_for};
use rayon::prelude::*;
use start::Factors;

/// The key that starts are chosen by.
pub(crate) const KEY: &str = "init_lora_weights";

/// Puts A and B in `params` where they start, and takes them out of the base. `start` is made from the base
/// if there is none yet.
pub(super) fn prepare(
    config: &LoraConfig,
    start: Option<Start>,
    params: &mut FlatBuffer,
    base: &mut dyn BaseWeights,
) -> Result<Start> {
    let start = match start {
        Some(start) => start,
        None => from_base(config, params.layout(), base)?,
    };
    start.put_into(params)?;
    start.subtract(config, base)?;
    Ok(start)
}

/// A linear that is adapted, as far as its start is concerned.
struct Linear<'a> {
    module: &'a str,
    rank: usize,
    scale: f32,
}

/// The linears whose A and B are in `layout`.
fn linears<'a>(config: &LoraConfig, layout: &'a ParamLayout) -> Result<Vec<Linear<'a>>> {
    let of_a = layout.by_name().filter_map(|(_, segment)| {
        let (module, part) = names::parse(&segment.spec.name)?;
        (part == Part::A).then_some((module, segment.spec.shape[0]))
    });
    let values = config.rank_and_alpha();
    of_a.map(|(module, rank)| {
        Ok(Linear {
            module,
            rank,
            scale: config.scale(rank, values.alpha_of(module)?),
        })
    })
    .collect()
}

/// Computes every start from the base's weights, as many at a time as there are threads.
pub(super) fn from_base(
    config: &LoraConfig,
    layout: &ParamLayout,
    base: &dyn BaseWeights,
) -> Result<Start> {
    let linears = linears(config, layout)?;
    let mut start = Start::zeros(layout)?;
    for some in linears.chunks(rayon::current_num_threads()) {
        let weights = some.iter().map(|linear| {
            let site = site(base, linear.module)?;
            let fault = config.init_lora_weights.fault_of_codes();
            match fault.filter(|_| base.is_quantised(site)) {
                None => base.read(site),
                Some(fault) => Err(Error::config(KEY, fault)),
            }
        });
        let weights: Vec<Tensor> = weights.collect::<Result<_>>()?;
        let factors: Vec<Factors> = some
            .par_iter()
            .zip(&weights)
            .map(|(linear, weight)| factors(config.init_lora_weights, linear, weight))
            .collect::<Result<_>>()?;
        for (linear, factors) in some.iter().zip(factors) {
            start.set(linear.module, factors)?;
        }
    }
    Ok(start)
}

/// A and B of one linear from its weight.
fn factors(init: InitLoraWeights, linear: &Linear<'_>, weight: &Tensor) -> Result<Factors> {
    let Linear {
        module,
        rank,
        scale,
    } = *linear;
    match init {
        InitLoraWeights::Pissa { iterations } => {
            // A function of the base alone, so that whoever loads the adapter can do it again.
            let stream = Stream::new(key_for(0, module));
            let iterations = iterations.map(|n| (n, stream));
            pissa::factors(weight.view(), rank, scale, iterations)
        }
        InitLoraWeights::Olora => olora::factors(weight.view(), rank),
        _ => Err(Error::config(
            KEY,
            format!("`{module}` starts from no weight"),
        )),
    }
}

fn site(base: &dyn BaseWeights, module: &str) -> Result<SiteId> {
    base.find(module)
        .ok_or_else(|| Error::config(KEY, format!("`{module}` is no linear of the base")))
}
