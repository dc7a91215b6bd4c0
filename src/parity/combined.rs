//! Several adapters: what combining them gave, both at once, one merged after the other.

use super::adapted::Adapted;
use super::arch::{FORWARD, GRADIENT, select};
use super::case::{Case, inputs};
use super::compare::Comparison;
use super::padded::PaddedBatch;
use ferrotune_core::io::{ModelFiles, SafetensorsFile};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Tensor, View, matmul};
use ferrotune_lora::{
    Arithmetic, Combination, CombineOptions, MajoritySign, MergeOptions, combine, merge,
};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The module whose updates are recorded.
const MODULE: &str = "base_model.model.model.layers.0.self_attn.q_proj";

struct Recording<'a> {
    case: &'a Case,
    base: PathBuf,
    expected: SafetensorsFile,
    padded: PaddedBatch,
    comparison: Comparison,
}

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let base = case.base()?;
    let mut recording = Recording {
        case,
        expected: SafetensorsFile::open(case.path("expected.safetensors"))?,
        padded: inputs(&SafetensorsFile::open(base.join("inputs.safetensors"))?, "")?,
        base,
        comparison: Comparison::default(),
    };
    let temporary = tempfile::tempdir().map_err(Error::write(std::env::temp_dir()))?;
    let place = |name: &str| temporary.path().join(name);
    for name in ["a", "b", "c"] {
        let logits = recording.logits(Some(&recording.adapter(name)))?;
        recording.compare(name, &logits)?;
    }
    let combos = case.json.get("combos").and_then(Value::as_object);
    for (name, combo) in combos.into_iter().flatten().filter(|(_, c)| c.is_object()) {
        let (adapters, options) = recording.options(combo)?;
        combine(&adapters, &place(name), &options)?;
        recording.compare_update(name, &place(name))?;
        let logits = recording.logits(Some(&place(name)))?;
        recording.compare(name, &logits)?;
    }
    let of = |names: [&str; 2]| names.map(|name| (recording.adapter(name), 1.0));
    let (both, merged) = (of(["a", "b"]), of(["a", "c"]));
    combine(&both, &place("both"), &CombineOptions::default())?;
    let logits = recording.logits(Some(&place("both")))?;
    recording.compare("active_a_and_b", &logits)?;
    combine(&merged, &place("sum"), &CombineOptions::default())?;
    let (from, to) = (recording.base.clone(), place("merged"));
    merge(&from, &place("sum"), &to, &MergeOptions::default())?;
    recording.compare_merged(&to)?;
    recording.compare_mixed()?;
    Ok(recording.comparison)
}

impl Recording<'_> {
    fn adapter(&self, name: &str) -> PathBuf {
        self.case.path("adapters").join(name)
    }

    /// What PEFT was asked for.
    fn options(&self, combo: &Value) -> Result<(Vec<(PathBuf, f64)>, CombineOptions)> {
        let list = |key: &str| combo[key].as_array().into_iter().flatten();
        let names = list("adapters").filter_map(Value::as_str);
        let weights = list("weights").filter_map(Value::as_f64);
        let name = combo["combination_type"].as_str().unwrap_or_default();
        let path = self.case.path("case.json");
        let combination =
            Combination::from_name(name).map_err(|message| Error::data(&path, None, message))?;
        let rank = combo["svd_rank"].as_u64().map(|rank| rank as usize);
        let options = CombineOptions {
            combination,
            rank,
            density: combo["density"].as_f64().unwrap_or(1.0),
            majority_sign: match combo["majority_sign_method"].as_str() {
                Some("frequency") => MajoritySign::Frequency,
                _ => MajoritySign::Total,
            },
            // Those with a rank are of updates in PEFT too.
            arithmetic: match rank {
                Some(_) => Arithmetic::Updates,
                None => Arithmetic::AsPeft,
            },
            ..CombineOptions::default()
        };
        Ok((
            names.map(|n| self.adapter(n)).zip(weights).collect(),
            options,
        ))
    }

    fn logits(&self, adapter: Option<&Path>) -> Result<Vec<f32>> {
        let (batch, _) = self.padded.pack();
        let adapted = Adapted::load(&self.base, adapter, DType::F32, &self.case.device)?;
        Ok(adapted.run(DType::F32, &batch)?.logits().to_vec())
    }

    fn compare(&mut self, name: &str, ours: &[f32]) -> Result<()> {
        let (_, places) = self.padded.pack();
        let theirs = select(
            &self.expected,
            &format!("logits.{name}"),
            &self.padded,
            &places,
        )?;
        // Where two singular values are near each other, the rank cuts between them by rounding.
        let cuts = name.contains("svd");
        let tolerance = if cuts { GRADIENT } else { FORWARD };
        let quantity = if cuts { "logits of a rank" } else { "logits" };
        self.comparison
            .tensor(quantity, name, ours, &theirs, tolerance);
        Ok(())
    }

    /// `B A` of the recorded module.
    fn compare_update(&mut self, name: &str, directory: &Path) -> Result<()> {
        let file = SafetensorsFile::open(directory.join("adapter_model.safetensors"))?;
        let read = |part: &str| -> Result<(Vec<f32>, [usize; 2])> {
            let name = format!("{MODULE}.{part}.weight");
            let shape = file.meta(&name).map(|meta| meta.matrix_shape());
            Ok((file.read_f32(&name)?, shape.unwrap_or_default()))
        };
        let ((a, [rank, inputs]), (b, [out, _])) = (read("lora_A")?, read("lora_B")?);
        let mut update = Tensor::zeros(DType::F32, out, inputs);
        let (b, a) = (
            View::from_f32(&b, out, rank),
            View::from_f32(&a, rank, inputs),
        );
        matmul::nn(update.view_mut(), 0.0, 1.0, b, a)?;
        let recorded = format!("delta.{name}.layers.0.q_proj");
        let (ours, theirs) = (update.to_f32_vec(), self.expected.read_f32(&recorded)?);
        self.comparison
            .tensor("delta", name, &ours, &theirs, FORWARD);
        Ok(())
    }

    fn compare_merged(&mut self, merged: &Path) -> Result<()> {
        let files = ModelFiles::open(merged)?;
        let prefix = "merged_a_c.";
        let names: Vec<String> = self.expected.names().map(str::to_owned).collect();
        for name in names.iter().filter_map(|name| name.strip_prefix(prefix)) {
            let theirs = self.expected.read_f32(&format!("{prefix}{name}"))?;
            let ours = files.read_f32(name)?;
            self.comparison
                .tensor("merged", name, &ours, &theirs, FORWARD);
        }
        let adapted = Adapted::load(merged, None, DType::F32, &self.case.device)?;
        let (batch, _) = self.padded.pack();
        let run = adapted.run(DType::F32, &batch)?;
        self.compare("merged_a_c", run.logits())
    }

    /// Each row of the batch through its own adapter, or none.
    fn compare_mixed(&mut self) -> Result<()> {
        let names = self.case.json.pointer("/combos/mixed_batch_adapter_names");
        let names = names.and_then(Value::as_array).cloned().unwrap_or_default();
        let (_, places) = self.padded.pack();
        let mut rows = Vec::new();
        for (row, name) in names.iter().filter_map(Value::as_str).enumerate() {
            let adapter = (name != "__base__").then(|| self.adapter(name));
            let logits = self.logits(adapter.as_deref())?;
            let width = logits.len() / places.len().max(1);
            let of_row = |at: &usize| places[*at] / self.padded.cols == row;
            let tokens = (0..places.len()).filter(of_row);
            rows.extend(tokens.flat_map(|t| logits[t * width..(t + 1) * width].to_vec()));
        }
        self.compare("mixed_batch", &rows)
    }
}
