//! One LoRA of several: a weighted sum of their updates, exact or pruned, of any rank.
//!
//! The sums are of what adapters change, `scale * B A`, and not of their factors: PEFT adds A to A and B to B
//! in `linear`, `ties`, `dare_*` and `magnitude_prune`, so that products of one adapter's A with another's B
//! come in, which are no part of either. [`Arithmetic::AsPeft`] does as PEFT does, to get what it got.
//!
//! # Source
//! Yadav et al.: "TIES-Merging" (2023); Yu et al.: "Language Models are Super Mario" (2023), DARE; PEFT's
//! `add_weighted_adapter`.

mod dense;
mod factored;
mod output;
mod sum;
#[cfg(test)]
mod tests;

pub use sum::{Combination, MajoritySign};

use crate::inspect::read::{Adapter, Factors};
use crate::{LoraBias, LoraConfig};
use ferrotune_core::checkpoint::BaseRecord;
use ferrotune_core::{Error, Result};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// Updates, `scale * B A`.
    #[default]
    Updates,
    /// What PEFT adds: in combinations of its that are not called `svd` or `cat`, A and B apart.
    AsPeft,
}

/// How adapters are combined.
#[derive(Clone, Debug)]
pub struct CombineOptions {
    /// What is done with the updates before they are added.
    pub combination: Combination,
    /// Rank of the result; by default all that a sum without pruning has, and else the largest of the
    /// adapters'.
    pub rank: Option<usize>,
    /// Share of the elements that pruning leaves, in (0, 1].
    pub density: f64,
    /// How signs are elected.
    pub majority_sign: MajoritySign,
    /// What is added.
    pub arithmetic: Arithmetic,
    /// Seed of random pruning.
    pub seed: u64,
}

impl Default for CombineOptions {
    fn default() -> Self {
        Self {
            combination: Combination::Linear,
            rank: None,
            density: 1.0,
            majority_sign: MajoritySign::Total,
            arithmetic: Arithmetic::Updates,
            seed: 42,
        }
    }
}

/// One module of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct CombinedModule {
    /// Its path in the base.
    pub name: String,
    /// Rank of its update.
    pub rank: usize,
    /// What the rank left out, of the norm of the combined update.
    pub relative_error: f64,
}

/// What [`combine`] wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct CombineReport {
    /// The modules, by name.
    pub modules: Vec<CombinedModule>,
}

impl CombineReport {
    /// The module whose rank left out most.
    #[must_use]
    pub fn worst(&self) -> Option<&CombinedModule> {
        let by_error = |a: &&CombinedModule, b: &&CombinedModule| {
            a.relative_error.total_cmp(&b.relative_error)
        };
        self.modules.iter().max_by(by_error)
    }
}

/// An update `B A`, without a scale.
pub(crate) struct Pair {
    /// `[rank, in]`.
    a: Vec<f32>,
    /// `[out, rank]`.
    b: Vec<f32>,
    rank: usize,
    relative_error: f64,
}

/// Writes to `output` one LoRA that is the combination of `adapters`, each with its weight.
///
/// A module that some of them adapt gets what these say.
///
/// # Errors
/// [`Error::Adapter`] for an adapter that is no plain LoRA, or is of another base than the first;
/// [`Error::Config`] for options that contradict each other; [`Error::Write`]. Nothing is written then.
pub fn combine(
    adapters: &[(PathBuf, f64)],
    output: &Path,
    options: &CombineOptions,
) -> Result<CombineReport> {
    options.check(adapters)?;
    let read = adapters.iter().map(|(directory, _)| plain(directory));
    let (read, configs): (Vec<Adapter>, Vec<LoraConfig>) =
        read.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let weights: Vec<f64> = adapters.iter().map(|(_, weight)| *weight).collect();
    let names: BTreeSet<&String> = read.iter().flat_map(|a| a.updates.keys()).collect();
    let names: Vec<&String> = names.into_iter().collect();
    options.require_rank(&read, &names)?;
    let pairs: Vec<Pair> = names
        .par_iter()
        .map(|name| {
            let updates = read.iter().zip(&weights).zip(adapters);
            let of_module = updates.filter_map(|((adapter, weight), (directory, _))| {
                Some((adapter.updates.get(*name)?, *weight, directory.as_path()))
            });
            let updates: Vec<(&Factors, f64, &Path)> = of_module.collect();
            same_shape(name, &updates)?;
            let updates: Vec<(&Factors, f64)> = updates.iter().map(|u| (u.0, u.1)).collect();
            sum::of_module(name, &updates, options)
        })
        .collect::<Result<_>>()?;
    let combined: BTreeMap<&str, &Pair> = names.iter().map(|n| n.as_str()).zip(&pairs).collect();
    let base = common_base(adapters)?;
    output::write_combined(&configs, &combined, output)?;
    BaseRecord::write(base.as_ref(), output)?;
    let module = |(name, pair): (&&String, &Pair)| CombinedModule {
        name: (*name).clone(),
        rank: pair.rank,
        relative_error: pair.relative_error,
    };
    Ok(CombineReport {
        modules: names.iter().zip(&pairs).map(module).collect(),
    })
}

/// The weights that all adapters say they were trained on; `None` where one says nothing or something else.
fn common_base(adapters: &[(PathBuf, f64)]) -> Result<Option<BaseRecord>> {
    let records = adapters.iter().map(|(at, _)| BaseRecord::read(at));
    let records = records.collect::<Result<Vec<_>>>()?;
    let first = records.first().cloned().flatten();
    Ok(first.filter(|first| records.iter().all(|record| record.as_ref() == Some(first))))
}

impl CombineOptions {
    fn check(&self, adapters: &[(PathBuf, f64)]) -> Result<()> {
        if adapters.is_empty() {
            return Err(Error::config(
                "adapter",
                "is not given; name one adapter at least",
            ));
        }
        if let Some((path, weight)) = adapters.iter().find(|(_, weight)| !weight.is_finite()) {
            let message = format!("has weight {weight} for {}", path.display());
            return Err(Error::config("adapter", message));
        }
        if !(self.density > 0.0 && self.density <= 1.0) {
            let message = format!("is {}, expected more than 0 and at most 1", self.density);
            return Err(Error::config("density", message));
        }
        if self.rank == Some(0) {
            return Err(Error::config("rank", "is 0, expected 1 or more"));
        }
        let apart =
            self.arithmetic == Arithmetic::AsPeft && self.combination.is_of_factors_in_peft();
        if apart && self.rank.is_some() {
            let message = "cannot be set where A and B are added apart, as PEFT does; PEFT's result has \
                           the rank of the adapters";
            return Err(Error::config("rank", message));
        }
        Ok(())
    }

    /// Refuses a rank that no module of the result can have.
    fn require_rank(&self, adapters: &[Adapter], names: &[&String]) -> Result<()> {
        let most = names.iter().filter_map(|name| {
            let updates = adapters.iter().filter_map(|a| a.updates.get(*name));
            let updates: Vec<&Factors> = updates.collect();
            let [out, inputs] = updates.first()?.shape;
            let ranks = updates.iter().map(|update| update.rank).sum::<usize>();
            // What pruning leaves of an update has any rank.
            let of_sum = match self.combination.prunes() {
                true => usize::MAX,
                false => ranks,
            };
            Some((out.min(inputs).min(of_sum), name, [out, inputs], ranks))
        });
        let most = most.max_by_key(|(most, ..)| *most);
        let Some((rank, (most, name, [out, inputs], ranks))) = self.rank.zip(most) else {
            return Ok(());
        };
        if rank <= most {
            return Ok(());
        }
        let why = match most < out.min(inputs) {
            true => format!("the ranks of its updates add up to {ranks}"),
            false => format!("its weight is {out} x {inputs}"),
        };
        let message = format!(
            "is {rank}, and no module of the result can have a rank above {most}, that of `{name}` ({why}); take {most} or \
             less, or leave it out"
        );
        Err(Error::config("rank", message))
    }
}

/// The adapter in `directory`, if it is low-rank updates of linears and tables and nothing else.
fn plain(directory: &Path) -> Result<(Adapter, LoraConfig)> {
    let adapter = Adapter::read(directory)?;
    let refuse = |message: String| Err(Error::adapter(directory, message));
    if adapter.peft_type != "LORA" {
        return refuse(format!(
            "is of {}; only LoRA adapters are combined",
            adapter.peft_type
        ));
    }
    let path = directory.join(crate::files::CONFIG_FILE);
    let config = LoraConfig::from_json(&path, &adapter.config)?;
    let features = [
        ("use_dora", config.use_dora),
        ("lora_bias", config.lora_bias),
        (
            "alora_invocation_tokens",
            config.alora_invocation_tokens.is_some(),
        ),
        ("bias", config.bias != LoraBias::None),
        ("modules_to_save", !config.modules_to_save.is_empty()),
        (
            "trainable_token_indices",
            config.trainable_token_indices.is_some(),
        ),
    ];
    if let Some((key, _)) = features.iter().find(|(_, on)| *on) {
        return refuse(format!(
            "has `{key}`, which is more than a low-rank update and has no sum; merge it into a base instead"
        ));
    }
    if config.init_lora_weights.changes_base() {
        return refuse(format!(
            "is relative to a base that {} changed; save it as a plain LoRA first",
            config.init_lora_weights.name()
        ));
    }
    let not_finite = |f: &Factors| f.a.iter().chain(&f.b).any(|v| !v.is_finite());
    if let Some((name, _)) = adapter.updates.iter().find(|(_, f)| not_finite(f)) {
        return refuse(format!("holds NaN or infinity in `{name}`"));
    }
    if adapter.updates.is_empty() {
        return refuse("has no low-rank update".into());
    }
    if let Some(name) = adapter.tensors.keys().next() {
        let directory = directory.display();
        tracing::warn!("`{name}` of {directory} is of its base, and left out of the result");
    }
    Ok((adapter, config))
}

fn same_shape(name: &str, updates: &[(&Factors, f64, &Path)]) -> Result<()> {
    let Some((first, _, of_first)) = updates.first() else {
        return Ok(());
    };
    match updates
        .iter()
        .find(|(factors, ..)| factors.shape != first.shape)
    {
        None => Ok(()),
        Some((factors, _, directory)) => Err(Error::adapter(
            *directory,
            format!(
                "`{name}` is {:?} here and {:?} in {}: adapters of different bases",
                factors.shape,
                first.shape,
                of_first.display()
            ),
        )),
    }
}
