//! How A and B start.
//!
//! A start is a line in `kind.rs` and a file here. Random ones follow from the seed (`random.rs`). The others
//! follow from the base's weights, or from what an [`Observation`] sees of data; [`Start`] holds their factors for
//! as long as a run lasts, where they are taken out of the base: `W - scale * B A`.

pub(super) mod corda;
pub(super) mod eva;
mod kind;
pub(super) mod loftq;
pub(super) mod lora_ga;
mod observe;
mod olora;
mod pissa;
mod random;
mod start;
#[cfg(test)]
mod tests;

pub use corda::CordaMethod;
pub use eva::EvaConfig;
pub use kind::InitLoraWeights;
pub use loftq::LoftqConfig;
pub use lora_ga::{Direction, LoraGaConfig, Scale};
pub use observe::Observation;
pub(super) use random::fill;
pub use start::Start;
pub(super) use start::rank_dimension;

use super::LoraConfig;
use crate::names::{self, Part};
use ferrotune_core::adapter::{BaseWeights, SiteId};
use ferrotune_core::params::{FlatBuffer, ParamLayout};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::Tensor;
use ferrotune_kernels::rng::{Stream, key_for};
use rayon::prelude::*;
use start::Factors;

/// The key that starts are chosen by.
pub(crate) const KEY: &str = "init_lora_weights";

/// Puts A and B in `params` where they start, and makes the base what they start from. `start` is made of the
/// base if there is none yet, and returned where the run needs to know it later.
pub(super) fn prepare(
    config: &LoraConfig,
    start: Option<Start>,
    params: &mut FlatBuffer,
    base: &mut dyn BaseWeights,
) -> Result<Option<Start>> {
    let init = config.init_lora_weights;
    if let InitLoraWeights::Loftq(loftq) = init {
        quantise(config, loftq, params, base)?;
        return Ok(None);
    }
    let start = match start {
        Some(start) => start,
        None if init.needs_data() => return Err(unseen(init)),
        None if init.subtracts() => from_base(config, params.layout(), base)?,
        None => return Ok(None),
    };
    start.put_into(params)?;
    if init.subtracts() {
        start.subtract(config, base)?;
    }
    Ok(Some(start))
}

/// A start from data without any.
fn unseen(init: InitLoraWeights) -> Error {
    let message = format!(
        "{} follows from data, and nothing was seen of them: take an `Observation` over some micro-batches, or, for \
         an adapter that is there, keep its initial_adapter/ beside it",
        init.name()
    );
    Error::config(KEY, message)
}

/// A linear that is adapted, as far as its start is concerned.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    module: String,
    rank: usize,
    scale: f32,
    /// `[out, in]` of its weight.
    shape: [usize; 2],
}

/// The linears whose A and B are in `layout`.
fn linears(config: &LoraConfig, layout: &ParamLayout) -> Result<Vec<Linear>> {
    let values = config.rank_and_alpha();
    let mut found = Vec::new();
    for (_, segment) in layout.by_name() {
        let Some((module, Part::A)) = names::parse(&segment.spec.name) else {
            continue;
        };
        let [rank, inputs] = [segment.spec.shape[0], segment.spec.shape[1]];
        let b = layout.find(&names::tensor(module, Part::B));
        found.push(Linear {
            module: module.to_owned(),
            rank,
            scale: config.scale(rank, values.alpha_of(module)?),
            shape: [b.map_or(0, |b| layout.segment(b).spec.shape[0]), inputs],
        });
    }
    Ok(found)
}

/// Elements of the weights that are decomposed at a time, in f64 and some five times over.
const AT_A_TIME: usize = 1 << 27;

/// `all` in parts, each with a linear per thread at most, and few enough elements to be decomposed side by side.
fn parts<T>(all: &[T], linear: impl Fn(&T) -> &Linear) -> Vec<&[T]> {
    let mut parts = Vec::new();
    let mut rest = all;
    while !rest.is_empty() {
        let mut elements = 0;
        let fits = |one: &&T| {
            elements += linear(one).shape.iter().product::<usize>();
            elements <= AT_A_TIME
        };
        let count = rest
            .iter()
            .take(rayon::current_num_threads())
            .take_while(fits)
            .count();
        let (part, behind) = rest.split_at(count.max(1));
        parts.push(part);
        rest = behind;
    }
    parts
}

/// Computes every start from the base's weights.
fn from_base(config: &LoraConfig, layout: &ParamLayout, base: &dyn BaseWeights) -> Result<Start> {
    let fault = config.init_lora_weights.fault_of_codes();
    let mut all = Vec::new();
    for some in parts(&linears(config, layout)?, |linear| linear) {
        let weights = some.iter().map(|linear| {
            let site = site(base, &linear.module)?;
            match fault.clone().filter(|_| base.code_bits(site).is_some()) {
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
        all.extend(some.iter().cloned().zip(factors));
    }
    Start::of(all)
}

/// A and B of one linear from its weight.
fn factors(init: InitLoraWeights, linear: &Linear, weight: &Tensor) -> Result<Factors> {
    let rank = linear.rank;
    match init {
        InitLoraWeights::Pissa { iterations } => {
            // A function of the base alone, so that whoever loads the adapter can do it again.
            let stream = Stream::new(key_for(0, &linear.module));
            let iterations = iterations.map(|n| (n, stream));
            pissa::factors(weight.view(), rank, linear.scale, iterations)
        }
        InitLoraWeights::Olora => olora::factors(weight.view(), rank),
        other => Err(unseen(other)),
    }
}

/// LoftQ.
fn quantise(
    config: &LoraConfig,
    loftq: LoftqConfig,
    params: &mut FlatBuffer,
    base: &mut dyn BaseWeights,
) -> Result<()> {
    let mut all = Vec::new();
    for some in parts(&linears(config, params.layout())?, |linear| linear) {
        let factors = loftq::start(loftq, some, base)?;
        all.extend(some.iter().cloned().zip(factors));
    }
    Start::of(all)?.put_into(params)
}

fn site(base: &dyn BaseWeights, module: &str) -> Result<SiteId> {
    base.find(module)
        .ok_or_else(|| Error::config(KEY, format!("`{module}` is no linear of the base")))
}
