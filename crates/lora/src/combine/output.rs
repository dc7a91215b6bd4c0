//! The files of a combined adapter.

use super::Pair;
use crate::LoraConfig;
use crate::files::write;
use crate::modules::EMBEDDINGS;
use crate::names::{self, Part};
use crate::target::TargetModules;
use ferrotune_core::Result;
use ferrotune_core::io::TensorData;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Writes `combined`, by module, with the configuration of the first adapter but for ranks, scales and targets.
pub(super) fn write_combined(
    configs: &[LoraConfig],
    combined: &BTreeMap<&str, &Pair>,
    output: &Path,
) -> Result<()> {
    // The commonest rank is the adapter's, so that patterns are few.
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for pair in combined.values() {
        *counts.entry(pair.rank).or_default() += 1;
    }
    let rank = counts.iter().max_by_key(|(_, count)| **count);
    let rank = rank.map_or(1, |(rank, _)| *rank);
    let others = || combined.iter().filter(|(_, pair)| pair.rank != rank);
    let name = |module: &str| module.to_owned();
    let mut config = configs.first().cloned().unwrap_or_default();
    // Scale 1 everywhere: it is in the factors.
    (config.rank, config.alpha, config.use_rslora) = (rank, rank as f64, false);
    config.rank_pattern = others().map(|(m, pair)| (name(m), pair.rank)).collect();
    config.alpha_pattern = others()
        .map(|(m, pair)| (name(m), pair.rank as f64))
        .collect();
    config.target_modules = Some(TargetModules::List(targets(configs, combined)));
    config.layers_to_transform = None;
    config.layers_pattern = Vec::new();
    config.exclude_modules = None;
    // Factors of a sum are others for a head than for its embedding, though their products are the same.
    config.ensure_weight_tying = false;
    let mut tensors = BTreeMap::new();
    for (module, pair) in combined {
        let last = module.rsplit('.').next().unwrap_or(module);
        let parts = if EMBEDDINGS.contains(&last) {
            [Part::EmbeddingA, Part::EmbeddingB]
        } else {
            [Part::A, Part::B]
        };
        let [a, b] = parts.map(|part| names::tensor(module, part));
        let (inputs, out) = (pair.a.len() / pair.rank, pair.b.len() / pair.rank);
        tensors.insert(a, TensorData::from_f32(&pair.a, [pair.rank, inputs]));
        tensors.insert(b, TensorData::from_f32(&pair.b, [out, pair.rank]));
    }
    write(output, &tensors, &config.to_json())
}

/// The adapters' own lists together, where they are lists and nothing else narrows them; the paths of the
/// modules otherwise.
fn targets(configs: &[LoraConfig], combined: &BTreeMap<&str, &Pair>) -> Vec<String> {
    let list = |config: &LoraConfig| match &config.target_modules {
        Some(TargetModules::List(list))
            if config.layers_to_transform.is_none()
                && config.exclude_modules.is_none()
                && !config.ensure_weight_tying =>
        {
            Some(list.clone())
        }
        _ => None,
    };
    let lists: Option<Vec<Vec<String>>> = configs.iter().map(list).collect();
    let all: BTreeSet<String> = match lists {
        Some(lists) => lists.into_iter().flatten().collect(),
        None => combined.keys().map(|module| (*module).to_owned()).collect(),
    };
    all.into_iter().collect()
}
