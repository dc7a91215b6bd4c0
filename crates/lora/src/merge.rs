//! Folds an adapter into its base: a checkpoint that needs no PEFT.
//!
//! `W' = round(W + scale * B A)`, the sum in f32 from the base's own shards, rounded once; what the
//! adapter trained of the base itself takes the place of the base's values. The base's directory is only
//! read: whoever wants the base back has it. Shards are streamed; the peak is one shard, one tensor and
//! the adapter.
//!
//! Where head and embedding are one tensor of the base and the adapter makes them differ, the output has
//! both, and `tie_word_embeddings: false`. (PEFT adds an update of either to the shared tensor, which
//! changes the other too.)
//!
//! An adapter with `layer_replication` gives a checkpoint with its stack of layers, each copy merged with its
//! own update. (PEFT merges none.)
//!
//! # Source
//! PEFT's `merge_and_unload` (without `safe_merge`, which rounds twice on a bf16 base).

mod output;
mod plan;
mod shards;
mod stack;
#[cfg(test)]
mod tests;

pub(crate) use shards::round;

use ferrotune_core::Result;
use ferrotune_core::io::{ModelFiles, StagedDir};
use std::collections::BTreeMap;
use std::path::Path;

/// Element type of the merged checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MergeDType {
    /// Each tensor keeps the base's. Every tensor that is not adapted keeps its bytes.
    #[default]
    SameAsBase,
    /// Every floating-point tensor in f32: no rounding at all, twice the size of bf16.
    Float32,
    /// Every floating-point tensor in bf16.
    BFloat16,
}

/// What to do when the output directory is there already and is not empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputDirectory {
    /// Refuse.
    #[default]
    MustBeNew,
    /// Replace it as a whole.
    Replace,
}

/// How to merge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeOptions {
    /// Element type of the result.
    pub dtype: MergeDType,
    /// What to do with an output directory that is not empty.
    pub output: OutputDirectory,
}

/// How well one tensor took its update.
#[derive(Clone, Debug, PartialEq)]
pub struct MergedTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// ‖delta‖ (Frobenius), delta = W' - W before rounding: scale * B A for an update.
    pub delta_norm: f64,
    /// ‖W‖, what delta is a change of.
    pub base_norm: f64,
    /// ‖(W' - W) - delta‖ / ‖delta‖: what rounding to the output dtype lost of the update. 0 if
    /// delta is 0.
    pub relative_error: f64,
}

/// What a merge did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergeReport {
    /// The adapted tensors, by name.
    pub tensors: Vec<MergedTensor>,
    /// Safetensors files written.
    pub files: usize,
    /// Bytes of all tensors written.
    pub bytes: u64,
}

impl MergeReport {
    /// The tensor that lost most of its update.
    #[must_use]
    pub fn worst(&self) -> Option<&MergedTensor> {
        self.tensors
            .iter()
            .max_by(|a, b| a.relative_error.total_cmp(&b.relative_error))
    }
}

/// What merging the adapter in `adapter_directory` into the checkpoint in `base_directory` would change of
/// each tensor, by name. Nothing is written.
///
/// # Errors
/// As [`merge`], but for those about the output.
pub fn changes(base_directory: &Path, adapter_directory: &Path) -> Result<Vec<MergedTensor>> {
    let (base, _, plan) = planned(base_directory, adapter_directory)?;
    let mut tensors = Vec::new();
    for file in base.shards() {
        tensors.extend(shards::changes_of_file(file, &plan)?);
    }
    tensors.sort_by(|a: &MergedTensor, b| a.name.cmp(&b.name));
    Ok(tensors)
}

/// Base, its config, and what becomes of it, all checked.
fn planned(base: &Path, adapter: &Path) -> Result<(ModelFiles, output::BaseConfig, plan::Plan)> {
    let base_config = output::BaseConfig::read(base)?;
    let base = ModelFiles::open(base)?;
    base_config.require_dense()?;
    base_config.require_matching(&base)?;
    let plan = plan::plan(&base, &base_config, adapter)?;
    Ok((base, base_config, plan))
}

/// Merges the adapter in `adapter_directory` into the checkpoint in `base_directory`.
///
/// Writes weights in the base's files (same names, and an index where the base has one),
/// `config.json` with its dtype set where it changes, `generation_config.json`, and the tokenizer:
/// the adapter's where it has one, the base's otherwise. The output directory appears as a whole
/// or not at all.
///
/// # Errors
/// [`ferrotune_core::Error::Config`] if the output directory is not usable as `options` say;
/// [`ferrotune_core::Error::Adapter`] if the adapter is damaged or does not fit the base: names,
/// shapes, missing or unexpected modules; [`ferrotune_core::Error::Model`] if the base is damaged
/// or quantised, or its config is of another model than its weights;
/// [`ferrotune_core::Error::Numeric`] if a merged value overflows its dtype;
/// [`ferrotune_core::Error::Write`], also if the output is a file.
pub fn merge(
    base_directory: &Path,
    adapter_directory: &Path,
    output_directory: &Path,
    options: &MergeOptions,
) -> Result<MergeReport> {
    output::require_usable(
        output_directory,
        &[base_directory, adapter_directory],
        options.output,
    )?;
    let (base, base_config, plan) = planned(base_directory, adapter_directory)?;
    let staged = StagedDir::create(output_directory)?;
    let mut report = MergeReport::default();
    let mut weight_map = BTreeMap::new();
    for file in base.shards() {
        let written = shards::merge_file(file, &plan, options.dtype, staged.path())?;
        report.files += 1;
        report.bytes += written.bytes;
        report.tensors.extend(written.tensors);
        let names = written.names.into_iter();
        weight_map.extend(names.map(|name| (name, written.file_name.clone())));
    }
    report.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    output::write_index(base_directory, &weight_map, report.bytes, staged.path())?;
    base_config.write(options.dtype, &plan, staged.path())?;
    output::copy_side_files(base_directory, adapter_directory, staged.path())?;
    staged.publish()?;
    Ok(report)
}
