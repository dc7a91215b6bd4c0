//! A saved PEFT adapter on its base: logits, loss, gradients of its parameters, merged weights.

use super::adapted::{Adapted, Recorded};
use super::arch::{FORWARD, GRADIENT, compare_generations, norm};
use super::case::{Case, dtype_of, inputs, scalar};
use super::compare::Comparison;
use super::initialised::Initialised;
use super::{complete, prompt};
use ferrotune_core::io::{FileDType, ModelFiles, SafetensorsFile};
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::DType;
use ferrotune_lora::MergeOptions;
use std::path::Path;

/// The head, which a recording names though it is the embedding.
const HEAD: &str = "lm_head.weight";
/// Largest difference of logits between a recorded adapter and its merged weights that is rounding.
const MERGED_NOISE: f64 = 1e-3;

/// A base of such cases alone: logits and loss.
pub(super) fn compare_base(case: &Case) -> Result<Comparison> {
    let base = &case.directory;
    let expected = SafetensorsFile::open(case.path("expected.safetensors"))?;
    let padded = inputs(&SafetensorsFile::open(case.path("inputs.safetensors"))?, "")?;
    let (batch, places) = padded.pack();
    let dtype = dtype_of(&ModelFiles::open(base)?.shards()[0]);
    let recorded = Recorded {
        file: &expected,
        prefix: "",
        padded: &padded,
        places: &places,
    };
    let mut comparison = Comparison::default();
    compare_generations(&mut comparison, case)?;
    let run = |dtype| Adapted::load(base, None, dtype, &case.device)?.run(dtype, &batch);
    let ours = run(dtype)?;
    match dtype {
        DType::F32 => recorded.compare_f32(&mut comparison, &ours)?,
        DType::Bf16 => recorded.compare_bf16(&mut comparison, &ours, &run(DType::F32)?)?,
    }
    Ok(comparison)
}

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let (base, adapter) = (case.base()?, case.path("adapter"));
    let expected = SafetensorsFile::open(case.path("expected.safetensors"))?;
    let padded = inputs(&SafetensorsFile::open(base.join("inputs.safetensors"))?, "")?;
    let (batch, places) = padded.pack();
    let dtype = dtype_of(&ModelFiles::open(&base)?.shards()[0]);
    let plain = Adapted::load(&base, Some(&adapter), dtype, &case.device)?;
    if plain.model.prompt().is_some() {
        return prompt::compare(case, &expected, &plain, &padded);
    }
    let initialised = Initialised::of(case, &base)?;
    // Gradients are those of the run, which trained another form of what was saved.
    let (adapted, plain) = match &initialised {
        Some(run) => (run.trained()?, Some(plain)),
        None => (plain, None),
    };
    complete::adapter(case, &expected, adapted.params.layout())?;
    let recorded = Recorded {
        file: &expected,
        prefix: "",
        padded: &padded,
        places: &places,
    };
    let mut comparison = Comparison::default();
    let ours = adapted.run(dtype, &batch)?;
    if dtype == DType::F32 {
        recorded.compare_f32(&mut comparison, &ours)?;
    } else {
        let exact = Adapted::load(&base, Some(&adapter), DType::F32, &case.device)?;
        let reference = exact.run(DType::F32, &batch)?;
        recorded.compare_bf16(&mut comparison, &ours, &reference)?;
    }
    if let (Some(run), Some(plain)) = (&initialised, &plain) {
        run.compare_start(&mut comparison, &recorded, &batch)?;
        let ours = plain.run(dtype, &batch)?;
        recorded.compare_logits(&mut comparison, "plain LoRA logits", &ours)?;
    }
    let temporary = tempfile::tempdir().map_err(Error::write(std::env::temp_dir()))?;
    let output = temporary.path().join("merged");
    let merged = ferrotune_lora::merge(&base, &adapter, &output, &MergeOptions::default());
    if let Some(refused) = case.json.get("merge_refused") {
        return match merged {
            Err(Error::Adapter { .. }) => Ok(comparison),
            Err(other) => Err(other),
            Ok(_) => {
                let message = format!("merged what PEFT cannot merge ({refused})");
                Err(Error::adapter(&adapter, message))
            }
        };
    }
    merged?;
    let shared = Shared::of(&base, &adapter)?;
    compare_merged(&mut comparison, case, &expected, &output, &shared)?;
    if dtype == DType::F32 {
        let merged = Adapted::load(&output, None, dtype, &case.device)?;
        recorded.compare_logits(
            &mut comparison,
            "merged logits",
            &merged.run(dtype, &batch)?,
        )?;
    }
    Ok(comparison)
}

/// What of a model several of its modules share.
struct Shared {
    embedding: String,
    head_is_adapted: bool,
    /// What the names of layers begin with, where some share their weights.
    layers: Option<String>,
}

impl Shared {
    fn of(base: &Path, adapter: &Path) -> Result<Self> {
        let config = DecoderConfig::open(base)?;
        let names = config.modules;
        let method = ferrotune_lora::load(adapter, &config)?;
        let weights = SafetensorsFile::open(adapter.join("adapter_model.safetensors"))?;
        let of_head = format!(".{}.", names.head);
        let head_is_adapted = weights.names().any(|name| name.contains(&of_head));
        let stack = method.decoder(config)?;
        Ok(Self {
            embedding: format!("{}.weight", names.embedding),
            head_is_adapted,
            layers: stack.is_restacked().then(|| format!("{}.", names.layers)),
        })
    }

    fn holds(&self, tensor: &str) -> bool {
        let in_layer = |layers: &String| tensor.starts_with(layers.as_str());
        let is_table = self.head_is_adapted && tensor == self.embedding;
        tensor == HEAD || is_table || self.layers.as_ref().is_some_and(in_layer)
    }
}

/// Merged weights, from what `ferrotune merge` wrote to `output`.
fn compare_merged(
    c: &mut Comparison,
    case: &Case,
    expected: &SafetensorsFile,
    output: &Path,
    shared: &Shared,
) -> Result<()> {
    let merged = ModelFiles::open(output)?;
    // PEFT adds an update of one module to a weight that others share. Where its merged model is another
    // than its adapted one by its own account, what counts is the logits of ours.
    let differs = case.number(&["merged_vs_adapter_logits_max_abs"]);
    let is_wrong = differs.is_some_and(|largest| largest > MERGED_NOISE);
    let names: Vec<String> = expected.names().map(str::to_owned).collect();
    for name in names {
        let ending = name
            .rsplit_once("merged.")
            .or(name.rsplit_once("merged_norm."));
        if is_wrong && ending.is_some_and(|(_, tensor)| shared.holds(tensor)) {
            continue;
        }
        let own = |tensor| match merged.meta(tensor) {
            None if tensor == HEAD => shared.embedding.as_str(),
            _ => tensor,
        };
        if let Some(tensor) = name.strip_prefix("merged.") {
            let (ours, theirs) = (merged.read_f32(own(tensor))?, expected.read_f32(&name)?);
            let bf16 = merged
                .meta(own(tensor))
                .is_some_and(|m| m.dtype == FileDType::BF16);
            // In bf16 the one rounding must be the same, but for sums that sit on a tie.
            let tolerance = if bf16 {
                f64::from(f32::from(half::bf16::EPSILON))
            } else {
                FORWARD
            };
            c.tensor("merged", tensor, &ours, &theirs, tolerance);
        } else if let Some(tensor) = name.strip_prefix("merged_norm.") {
            let ours = norm(&merged.read_f32(own(tensor))?);
            c.number(
                "merged_norm",
                tensor,
                ours,
                scalar(expected, &name)?,
                GRADIENT,
            );
        }
    }
    Ok(())
}
