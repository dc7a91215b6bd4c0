//! A saved PEFT adapter on its base: logits, loss, gradients of its parameters, merged weights.

use super::adapted::{Adapted, Recorded};
use super::arch::{FORWARD, GRADIENT, norm};
use super::case::{Case, dtype_of, inputs, scalar};
use super::compare::Comparison;
use super::complete;
use ferrotune_core::io::{FileDType, ModelFiles, SafetensorsFile};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::DType;
use ferrotune_lora::MergeOptions;
use std::path::Path;

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let (base, adapter) = (case.base()?, case.path("adapter"));
    let expected = SafetensorsFile::open(case.path("expected.safetensors"))?;
    let padded = inputs(&SafetensorsFile::open(base.join("inputs.safetensors"))?, "")?;
    let (batch, places) = padded.pack();
    let dtype = dtype_of(&ModelFiles::open(&base)?.shards()[0]);
    let adapted = Adapted::load(&base, Some(&adapter), dtype, &case.device)?;
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
    compare_merged(&mut comparison, &expected, &base, &adapter)?;
    Ok(comparison)
}

/// Merged weights: what `ferrotune merge` writes.
fn compare_merged(
    c: &mut Comparison,
    expected: &SafetensorsFile,
    base: &Path,
    adapter: &Path,
) -> Result<()> {
    let temporary = tempfile::tempdir().map_err(Error::write(std::env::temp_dir()))?;
    let output = temporary.path().join("merged");
    ferrotune_lora::merge(base, adapter, &output, &MergeOptions::default())?;
    let merged = ModelFiles::open(&output)?;
    let names: Vec<String> = expected.names().map(str::to_owned).collect();
    for name in names {
        if let Some(tensor) = name.strip_prefix("merged.") {
            let (ours, theirs) = (merged.read_f32(tensor)?, expected.read_f32(&name)?);
            let bf16 = merged
                .meta(tensor)
                .is_some_and(|m| m.dtype == FileDType::BF16);
            // In bf16 the one rounding must be the same, but for sums that sit on a tie.
            let tolerance = if bf16 {
                f64::from(f32::from(half::bf16::EPSILON))
            } else {
                FORWARD
            };
            c.tensor("merged", tensor, &ours, &theirs, tolerance);
        } else if let Some(tensor) = name.strip_prefix("merged_norm.") {
            let ours = norm(&merged.read_f32(tensor)?);
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
