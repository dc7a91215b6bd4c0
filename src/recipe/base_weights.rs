//! The weights of the base: their files, and how a run holds and computes with them.

use crate::device;
use ferrotune_core::config::{Dtype, TrainConfig};
use ferrotune_core::io::{FileDType, ModelFiles};
use ferrotune_core::model::{DecoderConfig, ModelPlan, WeightFormat, WeightSource};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Device};
use std::path::Path;

/// Checks names and shapes of the weights from the headers of their files.
pub(super) fn weights(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
) -> Result<Option<ModelFiles>> {
    if config.model.random_init {
        return Ok(None);
    }
    let files = ModelFiles::open(base)?;
    files.check(&ModelPlan::new(decoder))?;
    if files.has_four_bit() && !config.lora.use_peft {
        let message = format!(
            "is false, and the weights of {} are held in 4 bits, which cannot be trained; set use_peft: true, or \
             give the checkpoint they were made from",
            base.display()
        );
        return Err(Error::config("use_peft", message));
    }
    Ok(Some(files))
}

/// As asked for; `auto` is as the files have it, and on a GPU bf16 where `bf16: true` says so.
pub(super) fn weight_format(
    config: &TrainConfig,
    files: Option<&ModelFiles>,
    device: &Device,
) -> WeightFormat {
    let dtype = match config.model.base_dtype() {
        Dtype::Auto if device.is_cuda() && config.model.bf16 == Some(true) => DType::Bf16,
        Dtype::Float32 => DType::F32,
        Dtype::Bfloat16 => DType::Bf16,
        Dtype::Auto => {
            let is_bf16 = |files: &ModelFiles| {
                files
                    .names()
                    .any(|n| files.meta(n).is_some_and(|m| m.dtype == FileDType::BF16))
            };
            if files.is_some_and(is_bf16) {
                DType::Bf16
            } else {
                DType::F32
            }
        }
    };
    WeightFormat {
        dtype,
        four_bit: config.model.four_bit(),
    }
}

/// f32 on a CPU, where bf16 saves memory but no time, unless `bf16: true` asks for it; on a GPU the
/// dtype of the weights.
pub(super) fn activation_dtype(config: &TrainConfig, weights: DType, device: &Device) -> DType {
    match (device, config.model.bf16) {
        (Device::Cpu, Some(true)) => DType::Bf16,
        _ => device::activation_dtype(device, weights),
    }
}
