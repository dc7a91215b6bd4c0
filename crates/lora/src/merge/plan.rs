//! Which tensors of the checkpoint change, and by what. Everything is checked before any output.

use super::output::BaseConfig;
use crate::PeftConfig;
use crate::lora::{CONFIG_FILE, Factors, LoraConfig, read_factors};
use crate::target::{self, TargetModules};
use ferrotune_core::adapter::{Site, SiteId, SiteKind};
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::ModelPlan;
use ferrotune_core::{Error, Result, suggest};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The update of one tensor.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) factors: Factors,
    pub(super) scale: f32,
    /// Whether the tensor is `[in_features, out_features]`.
    pub(super) stored_transposed: bool,
}

/// Modules whose weights files hold as `[in_features, out_features]`.
pub(super) fn stored_transposed(plan: Option<&ModelPlan>) -> BTreeSet<&str> {
    let sites = plan.into_iter().flat_map(|plan| &plan.sites);
    let transposed = sites.filter(|site| site.stored_transposed);
    transposed.map(|site| site.name.as_str()).collect()
}

/// The updates by tensor name, checked against the checkpoint.
pub(super) fn updates(
    base: &ModelFiles,
    base_config: &BaseConfig,
    transposed: &BTreeSet<&str>,
    adapter_directory: &Path,
) -> Result<BTreeMap<String, Update>> {
    let PeftConfig::Lora(config) = PeftConfig::load(adapter_directory)?;
    let config = config.with_default_targets(base_config.model_type())?;
    let factors = read_factors(adapter_directory)?;
    require_targets_present(&config, base, &factors, adapter_directory)?;
    let modules: Vec<&str> = factors.keys().map(String::as_str).collect();
    let values = config.rank_and_alpha().resolve(&modules)?;
    factors
        .into_iter()
        .zip(values)
        .map(|((module, factors), (rank, alpha))| {
            let stored_transposed = transposed.contains(module.as_str());
            let mut expected = [factors.out_features, factors.in_features];
            if stored_transposed {
                expected.reverse();
            }
            require_fit(base, base_config, &module, expected, adapter_directory)?;
            if factors.rank != rank {
                return Err(Error::adapter(
                    adapter_directory,
                    format!(
                        "`{module}` has rank {} in its tensors and {rank} in {CONFIG_FILE}",
                        factors.rank
                    ),
                ));
            }
            let scale = config.scale(rank, alpha);
            let update = Update {
                factors,
                scale,
                stored_transposed,
            };
            Ok((weight_name(&module), update))
        })
        .collect()
}

fn weight_name(module: &str) -> String {
    format!("{module}.weight")
}

/// Refuses an adapter that lacks modules its own configuration targets.
///
/// The checkpoint stands in for the model: each weight is a module. It does not tell an embedding
/// or the head from a linear layer, so `all-linear` cannot be checked this way.
fn require_targets_present(
    config: &LoraConfig,
    base: &ModelFiles,
    factors: &BTreeMap<String, Factors>,
    adapter_directory: &Path,
) -> Result<()> {
    let selection = config.selection()?;
    if *selection.target_modules == TargetModules::AllLinear {
        return Ok(());
    }
    let sites = modules_of(base);
    let targeted: BTreeSet<&str> = target::select(&sites, &selection)?
        .into_iter()
        .map(|site| site.name.as_str())
        .collect();
    let present: BTreeSet<&str> = factors.keys().map(String::as_str).collect();
    if let Some(module) = targeted.difference(&present).next() {
        return Err(Error::adapter(
            adapter_directory,
            format!(
                "{CONFIG_FILE} targets `{module}`, but its tensors are missing ({} of {} modules \
                 have tensors)",
                present.len(),
                targeted.len()
            ),
        ));
    }
    // A module that the base lacks is reported by `require_fit`, with the nearest name.
    let unexpected = present
        .difference(&targeted)
        .find(|module| base.meta(&weight_name(module)).is_some());
    match unexpected {
        None => Ok(()),
        Some(module) => Err(Error::adapter(
            adapter_directory,
            format!("holds tensors for `{module}`, which {CONFIG_FILE} does not target"),
        )),
    }
}

fn modules_of(base: &ModelFiles) -> Vec<Site> {
    base.names()
        .filter_map(|name| Some((name.strip_suffix(".weight")?, base.meta(name)?)))
        .enumerate()
        .map(|(id, (module, meta))| {
            let (kind, in_features) = match meta.shape.as_slice() {
                [_, columns] => (SiteKind::Linear, *columns),
                _ => (SiteKind::Norm, 1),
            };
            Site {
                id: SiteId(id),
                name: module.into(),
                kind,
                in_features,
                out_features: meta.shape.first().copied().unwrap_or(1),
                bias: false,
                stored_transposed: false,
                layer: None,
                output_head: false,
                tied_to: None,
                execution_order: id,
            }
        })
        .collect()
}

/// Refuses a module whose weight is not in the checkpoint, has other dimensions or is shared.
fn require_fit(
    base: &ModelFiles,
    base_config: &BaseConfig,
    module: &str,
    expected: [usize; 2],
    adapter_directory: &Path,
) -> Result<()> {
    let name = weight_name(module);
    if module == "lm_head" && (base_config.ties_head() || base.meta(&name).is_none()) {
        return Err(Error::adapter(
            adapter_directory,
            "adapts `lm_head`, whose weight the base shares with its input embedding \
             (`tie_word_embeddings`): merging would change both",
        ));
    }
    let Some(meta) = base.meta(&name) else {
        return Err(Error::adapter(
            adapter_directory,
            format!(
                "adapts `{module}`, but the base has no tensor `{name}`{}; is it the right base?",
                suggest::did_you_mean(&name, base.names())
            ),
        ));
    };
    if meta.shape != expected {
        return Err(Error::adapter(
            adapter_directory,
            format!(
                "the update of `{module}` is {expected:?}, but the base's `{name}` is {:?}; is it \
                 the right base?",
                meta.shape
            ),
        ));
    }
    Ok(())
}
