//! The weights of the base: their files, and how a run holds and computes with them.

use crate::device;
use ferrotune_core::config::{Dtype, TrainConfig};
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::{
    DecoderConfig, ModelPlan, NewHead, Quantise, RandomWeights, WeightFormat, WeightSource,
};
use ferrotune_core::{Error, Result, suggest};
use ferrotune_kernels::{DType, Device};
use std::path::Path;

/// Checks names and shapes of the weights from the headers of their files.
pub(super) fn weights(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
) -> Result<Option<ModelFiles>> {
    check_skipped(config, decoder)?;
    if config.model.random_init {
        return Ok(None);
    }
    let files = ModelFiles::open(base)?;
    let plan = ModelPlan::new(decoder);
    match (NewHead::is_needed(decoder, &files), config.model.num_labels) {
        (false, _) => files.check(&plan)?,
        (true, Some(_)) => NewHead {
            rest: &files,
            head: RandomWeights { seed: 0 },
        }
        .check(&plan)?,
        (true, None) => {
            let message = format!(
                "is not set, and {} lacks the head of its classifier (`score.weight`); give the number of classes for a \
                 new one",
                base.display()
            );
            return Err(Error::config("num_labels", message));
        }
    }
    if let Some(held) = files.quantisation()
        && !config.lora.use_peft
    {
        let message = format!(
            "is false, and the weights of {} are held in {held}, which cannot be trained; set use_peft: true, or \
             give the checkpoint they were made from",
            base.display()
        );
        return Err(Error::config("use_peft", message));
    }
    require_one_format(config, &files)?;
    Ok(Some(files))
}

/// Refuses keys that ask for another format than the files hold already.
fn require_one_format(config: &TrainConfig, files: &ModelFiles) -> Result<()> {
    let (Some(held), Some(asked)) = (files.quantisation(), config.model.quantise()) else {
        return Ok(());
    };
    let asked = asked.format.name();
    if held == asked {
        return Ok(());
    }
    let key = match asked {
        "int8" => "load_in_8bit",
        "fp8" => "load_in_fp8",
        _ if ["nf4", "fp4"].contains(&held) => "bnb_4bit_quant_type",
        _ => "load_in_4bit",
    };
    let message = format!(
        "asks for {asked}, and the files of the base hold {held} already; leave it out, or give the checkpoint that they \
         were made from"
    );
    Err(Error::config(key, message))
}

/// Every module that is not to be quantised must be there.
fn check_skipped(config: &TrainConfig, decoder: &DecoderConfig) -> Result<()> {
    const KEY: &str = "llm_int8_skip_modules";
    let sites = ModelPlan::new(decoder).sites;
    for skip in &config.model.llm_int8_skip_modules {
        if !sites.iter().any(|site| Quantise::skips(skip, &site.name)) {
            let words = sites
                .iter()
                .flat_map(|site| site.name.split('.').chain([&*site.name]));
            let hint = suggest::did_you_mean(skip, words);
            let message = format!("`{skip}` begins and ends the name of no module{hint}");
            return Err(Error::config(KEY, message));
        }
    }
    Ok(())
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
        Dtype::Auto => files.map_or(DType::F32, ModelFiles::dtype),
    };
    WeightFormat {
        dtype,
        quantise: config.model.quantise(),
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
