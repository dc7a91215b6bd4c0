//! A saved PEFT adapter on its base: logits, loss, gradients of its parameters, merged weights.

use super::arch::{BF16_FACTOR, FORWARD, GRADIENT, mean_gradient, norm, select};
use super::case::{Case, dtype_of, inputs, scalar};
use super::compare::{Comparison, relative_error};
use super::complete;
use super::padded::PaddedBatch;
use ferrotune_core::adapter::Adapter;
use ferrotune_core::data::PackedBatch;
use ferrotune_core::io::{FileDType, ModelFiles, SafetensorsFile};
use ferrotune_core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::trainer::attach;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Device, Workspace};
use ferrotune_lora::MergeOptions;
use std::path::Path;

/// Largest error that PyTorch's own bf16 forward of such a tiny model is taken to have (0.016 was
/// seen); a recorded bf16 result further than this from our f32 is not rounding. A wrong scale, mask
/// or rotation shows as 0.3 and more.
const BF16_FORWARD: f64 = 0.05;
/// The same for gradients (0.038 was seen).
const BF16_GRADIENT: f64 = 0.12;

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let base = case.base()?;
    let expected = SafetensorsFile::open(case.path("expected.safetensors"))?;
    let padded = inputs(&SafetensorsFile::open(base.join("inputs.safetensors"))?, "")?;
    let (batch, places) = padded.pack();
    let dtype = dtype_of(&ModelFiles::open(&base)?.shards()[0]);
    let adapted = Adapted::load(&base, &case.path("adapter"), dtype, &case.device)?;
    complete::adapter(case, &expected, adapted.params.layout())?;
    let mut comparison = Comparison::default();
    if dtype == DType::F32 {
        let ours = adapted.run(DType::F32, &batch)?;
        compare_f32(&mut comparison, &expected, &ours, &padded, &places)?;
    } else {
        let ours = adapted.run(DType::Bf16, &batch)?;
        let exact = Adapted::load(&base, &case.path("adapter"), DType::F32, &case.device)?;
        let reference = exact.run(DType::F32, &batch)?;
        compare_bf16(
            &mut comparison,
            &expected,
            &ours,
            &reference,
            &padded,
            &places,
        )?;
    }
    compare_merged(&mut comparison, &expected, &base, &case.path("adapter"))?;
    Ok(comparison)
}

/// A base model with an adapter read from disk.
struct Adapted {
    model: Model,
    params: FlatBuffer,
}

/// What one forward and backward gave.
struct Recomputed {
    logits: Vec<f32>,
    loss: f64,
    grads: FlatBuffer,
}

impl Adapted {
    fn load(base: &Path, adapter: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let config = DecoderConfig::open(base)?;
        let method: Box<dyn Adapter> = ferrotune_lora::load(adapter, &config.model_type)?;
        let (attachments, mut params) = attach(&config, method.as_ref())?;
        params.move_to(device);
        let model = Model::load(
            &config,
            attachments,
            &ModelFiles::open(base)?,
            &mut params,
            dtype,
        )?;
        method.load(&mut params, adapter)?;
        Ok(Self { model, params })
    }

    fn run(&self, dtype: DType, batch: &PackedBatch) -> Result<Recomputed> {
        let workspace = Workspace::on(self.model.device().clone(), batch.tokens());
        let pass = Pass {
            workspace: &workspace,
            dtype,
            mode: Mode::Eval,
        };
        let logits = self.model.logits(pass, &self.params, batch)?.to_f32_vec();
        let (loss, grads) = mean_gradient(&self.model, pass, &self.params, batch)?;
        Ok(Recomputed {
            logits,
            loss,
            grads,
        })
    }
}

/// A gradient and its recorded twin: `(name, ours, theirs)`.
type GradientPair<'a> = (String, &'a [f32], Vec<f32>);

/// The recorded gradients with ours.
fn gradients<'a>(
    expected: &SafetensorsFile,
    grads: &'a FlatBuffer,
) -> Result<Vec<GradientPair<'a>>> {
    let names = expected.names().filter_map(|n| n.strip_prefix("grad."));
    names
        .map(|name| {
            let id = grads.layout().find(name).ok_or_else(|| {
                Error::data(
                    expected.path(),
                    None,
                    format!("`grad.{name}` names no trainable parameter"),
                )
            })?;
            Ok((
                name.to_owned(),
                grads.get(id),
                expected.read_f32(&format!("grad.{name}"))?,
            ))
        })
        .collect()
}

fn compare_f32(
    c: &mut Comparison,
    expected: &SafetensorsFile,
    ours: &Recomputed,
    padded: &PaddedBatch,
    places: &[usize],
) -> Result<()> {
    c.tensor(
        "logits",
        "logits",
        &ours.logits,
        &select(expected, "logits", padded, places)?,
        FORWARD,
    );
    c.number(
        "loss",
        "loss",
        ours.loss,
        scalar(expected, "loss")?,
        FORWARD,
    );
    for (name, ours, theirs) in gradients(expected, &ours.grads)? {
        c.tensor("grad", &name, ours, &theirs, GRADIENT);
    }
    Ok(())
}

/// PyTorch recorded bf16 only: our f32 run stands for the exact result, and our bf16 run may be at
/// most twice as far from it as PyTorch's. That PyTorch's is near it bounds our f32 run itself.
fn compare_bf16(
    c: &mut Comparison,
    expected: &SafetensorsFile,
    ours: &Recomputed,
    reference: &Recomputed,
    padded: &PaddedBatch,
    places: &[usize],
) -> Result<()> {
    let mut judge =
        |quantity: &str, name: &str, ours: &[f32], exact: &[f32], theirs: &[f32], bound: f64| {
            let theirs_error = relative_error(theirs, exact);
            c.error(
                &format!("{quantity} (recorded against f32)"),
                name,
                theirs_error,
                bound,
            );
            c.beside_peer(
                quantity,
                name,
                relative_error(ours, exact),
                theirs_error,
                BF16_FACTOR,
            );
        };
    let logits = select(expected, "logits", padded, places)?;
    judge(
        "logits",
        "logits",
        &ours.logits,
        &reference.logits,
        &logits,
        BF16_FORWARD,
    );
    let loss = [scalar(expected, "loss")? as f32];
    judge(
        "loss",
        "loss",
        &[ours.loss as f32],
        &[reference.loss as f32],
        &loss,
        BF16_FORWARD,
    );
    let exact = gradients(expected, &reference.grads)?;
    for ((name, ours, theirs), (_, exact, _)) in
        gradients(expected, &ours.grads)?.into_iter().zip(exact)
    {
        judge("grad", &name, ours, exact, &theirs, BF16_GRADIENT);
    }
    Ok(())
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
