//! A checkpoint that Transformers saved in 4 or 8 bits: its weights, logits and loss, and those of an adapter
//! over it with the gradients of its parameters.

use super::adapted::{Adapted, Recorded};
use super::case::{Case, dtype_of, inputs};
use super::compare::Comparison;
use super::{complete, cpu_kernel};
use crate::device::activation_dtype;
use ferrotune_core::data::PackedBatch;
use ferrotune_core::io::{ModelFiles, SafetensorsFile};
use ferrotune_core::model::{DecoderConfig, ModelPlan};
use ferrotune_core::params::transpose;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::dequantise::Quantised;
use ferrotune_kernels::{DType, Device, Tensor};
use std::collections::BTreeSet;
use std::path::Path;

/// Bits are compared: nothing is tolerated.
const EXACT: f64 = 0.0;

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let inputs_file = case.base()?.join("inputs.safetensors");
    let padded = inputs(&SafetensorsFile::open(inputs_file)?, "")?;
    let expected = SafetensorsFile::open(case.path("expected.safetensors"))?;
    let files = ModelFiles::open(&case.directory)?;
    let names = match files.quantisation() {
        Some("int8") => ["lora_adapter", "lora8."],
        Some(_) => ["qlora_adapter", "qlora."],
        None => {
            let message = "holds no weight as codes; only such checkpoints are compared";
            return Err(Error::data(case.path("model.safetensors"), None, message));
        }
    };
    let [adapter, prefix] = names;
    // What is in rows of padding has a say in which columns become bytes.
    let (batch, places) = match files.quantisation() {
        Some("int8") => padded.pack_with_padding(),
        _ => padded.pack(),
    };
    let mut comparison = Comparison::default();
    compare_weights(&mut comparison, case, &expected, &files)?;

    let run = Run {
        case,
        files: &files,
        dtype: files.dtype(),
        batch,
    };
    let adapter = case.path(adapter);
    for (prefix, adapter) in [("", None), (prefix, Some(adapter.as_path()))] {
        let recorded = Recorded {
            file: &expected,
            prefix,
            padded: &padded,
            places: &places,
        };
        run.compare(&mut comparison, &recorded, adapter)?;
    }
    Ok(comparison)
}

/// What both runs of a case share.
struct Run<'a> {
    case: &'a Case,
    files: &'a ModelFiles,
    dtype: DType,
    batch: PackedBatch,
}

impl Run<'_> {
    fn compare(
        &self,
        c: &mut Comparison,
        recorded: &Recorded<'_>,
        adapter: Option<&Path>,
    ) -> Result<()> {
        let (base, device) = (&self.case.directory, &self.case.device);
        let load = |dtype| Adapted::load(base, adapter, dtype, device);
        let ours = load(self.dtype)?;
        complete::quantised(recorded.file, recorded.prefix, ours.params.layout())?;
        if self.dtype != DType::F32 {
            // Under an adapter everything but the products was recorded in f32, as on a CPU here.
            let activations = match adapter {
                Some(_) => activation_dtype(device, self.dtype),
                None => self.dtype,
            };
            let reference = load(DType::F32)?.run(DType::F32, &self.batch)?;
            return recorded.compare_bf16(c, &ours.run(activations, &self.batch)?, &reference);
        }
        let ours = ours.run(DType::F32, &self.batch)?;
        // Bytes are multiplied alike whether a gradient is asked for or not.
        let adapter = adapter.filter(|_| self.files.quantisation() != Some("int8"));
        let Some(adapter) = adapter else {
            return recorded.compare_f32(c, &ours);
        };
        let plan = ModelPlan::new(&DecoderConfig::open(base)?);
        let rounding =
            Adapted::load_with(base, Some(adapter), DType::F32, device, |attachments| {
                cpu_kernel::in_front(&plan, self.files, device, attachments)
            })?;
        let rounded = rounding.run(DType::F32, &self.batch)?;
        // Which kernel ran depends on the processor it was recorded on.
        let rounds = recorded.logits_error(&rounded)? < recorded.logits_error(&ours)?;
        recorded.compare_f32(c, if rounds { &rounded } else { &ours })
    }
}

/// The values of the weights bit by bit: those recorded, and of every weight those that quantising the
/// base gives here.
fn compare_weights(
    c: &mut Comparison,
    case: &Case,
    expected: &SafetensorsFile,
    files: &ModelFiles,
) -> Result<()> {
    let base = ModelFiles::open(case.base()?)?;
    let sites = ModelPlan::new(&DecoderConfig::open(&case.directory)?).sites;
    let transposed = sites.iter().filter(|site| site.stored_transposed);
    let transposed: BTreeSet<String> = transposed.map(|site| site.tensor("weight")).collect();
    for name in files.weight_shapes().into_keys() {
        let (Some(codes), Some(format)) = (files.read_quantised(name)?, files.quant_format(name))
        else {
            continue;
        };
        let [rows, cols] = codes.shape();
        let saved = values(codes, DType::F32, &case.device)?;
        let mut original = base.read_f32(name)?;
        if transposed.contains(name) {
            original = transpose(&original, cols, rows);
        }
        let original = Tensor::from_f32(original, rows, cols);
        let made = values(format.quantise(original.view())?, DType::F32, &case.device)?;
        c.tensor("quantised here", name, &made, &saved, EXACT);
    }
    for name in expected.names() {
        let Some(weight) = name.strip_prefix("dequant.") else {
            continue;
        };
        let Some(codes) = files.read_quantised(weight)? else {
            let message = format!("`{name}` is of a weight that is not held as codes");
            return Err(Error::data(expected.path(), None, message));
        };
        let ours = values(codes, dtype_of(expected), &case.device)?;
        c.tensor("dequant", weight, &ours, &expected.read_f32(name)?, EXACT);
    }
    Ok(())
}

fn values(codes: Quantised, dtype: DType, device: &Device) -> Result<Vec<f32>> {
    let codes = codes.to_device(device);
    let [rows, cols] = codes.shape();
    let mut values = Tensor::empty(device, dtype, rows, cols);
    codes.dequantise(values.view_mut())?;
    Ok(values.to_f32_vec())
}
