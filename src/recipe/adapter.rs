use ferrotune_core::adapter::Adapter;
use ferrotune_core::config::{InitLoraWeights as Init, LoraBias, Names, TrainConfig};
use ferrotune_core::full::FullFineTuning;
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::{Error, Result};
use ferrotune_lora::{ExcludeModules, InitLoraWeights, LoraAdapter, LoraConfig, TargetModules};
use std::path::Path;

/// The method a configuration asks for: LoRA, or full fine-tuning with `use_peft: false`.
///
/// # Errors
/// [`Error::Config`] for a setting that contradicts another or is not supported yet.
pub fn adapter_of(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
) -> Result<Box<dyn Adapter>> {
    if !config.lora.use_peft {
        return Ok(Box::new(FullFineTuning));
    }
    let lora = lora_config(config, base)?;
    Ok(Box::new(LoraAdapter::new(lora, &decoder.model_type)?))
}

fn lora_config(config: &TrainConfig, base: &Path) -> Result<LoraConfig> {
    let lora = &config.lora;
    if lora.lora_bias != LoraBias::None {
        return Err(Error::config(
            "lora_bias",
            format!(
                "`{}` is not supported yet; use none",
                lora.lora_bias.as_str()
            ),
        ));
    }
    if let Some(name) = lora.lora_modules_to_save.first() {
        return Err(Error::config(
            "lora_modules_to_save",
            format!("`{name}`: not supported yet; leave it empty"),
        ));
    }
    let layers = &lora.lora_layers_to_transform;
    Ok(LoraConfig {
        rank: lora.lora_r,
        alpha: lora.lora_alpha,
        dropout: lora.lora_dropout,
        use_rslora: lora.use_rslora,
        target_modules: lora.lora_target_modules.as_ref().map(targets),
        exclude_modules: lora.lora_exclude_modules.as_ref().map(excludes),
        layers_to_transform: (!layers.is_empty()).then(|| layers.clone()),
        rank_pattern: lora.lora_rank_pattern.clone().into_iter().collect(),
        alpha_pattern: lora.lora_alpha_pattern.clone().into_iter().collect(),
        init_lora_weights: init(&lora.init_lora_weights)?,
        task_type: Some(lora.lora_task_type.clone()),
        base_model_name_or_path: Some(base.display().to_string()),
        ..LoraConfig::default()
    })
}

fn targets(names: &Names) -> TargetModules {
    match names {
        Names::Pattern(text) => TargetModules::from_text(text),
        Names::List(list) => TargetModules::List(list.clone()),
    }
}

fn excludes(names: &Names) -> ExcludeModules {
    match names {
        Names::Pattern(text) => ExcludeModules::Regex(text.clone()),
        Names::List(list) => ExcludeModules::List(list.clone()),
    }
}

fn init(init: &Init) -> Result<InitLoraWeights> {
    match init {
        Init::Default => Ok(InitLoraWeights::Kaiming),
        Init::Random => Ok(InitLoraWeights::Random),
        Init::Method(name) if name == "gaussian" => Ok(InitLoraWeights::Gaussian),
        Init::Method(name) => Err(Error::config(
            "init_lora_weights",
            format!("`{name}` is not supported yet; supported: true, false, gaussian"),
        )),
    }
}
