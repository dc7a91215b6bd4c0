//! SmolLM 3: every fourth layer, or those that `no_rope_layers` marks with 0, has no positions.

use super::layer_types;
use crate::Result;
use crate::model::{DecoderConfig, HfConfig};
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
    }));
    let common = DecoderConfig::common(config)?;
    let rope_layers = rope_layers(config, common.layers)?;
    // Layers that `layer_types` names slide whether it says so or not, as in Transformers.
    let slides = config.flag_or("use_sliding_window", false)?;
    let window = layer_types::sliding_window(config)?;
    let windows =
        layer_types::windows(config, common.layers, window, |i| slides && !rope_layers[i])?;
    let attention_bias = config.flag_or("attention_bias", false)?;
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: config.flag_or("mlp_bias", false)?,
        tie_word_embeddings: config.flag_or("tie_word_embeddings", true)?,
        sliding_windows: windows,
        layer_ropes: rope_layers.iter().map(|rope| rope.then_some(0)).collect(),
        ..common
    })
}

fn rope_layers(config: &HfConfig, layers: usize) -> Result<Vec<bool>> {
    let Some(listed) = config.get("no_rope_layers") else {
        let interval = config.size_or("no_rope_layer_interval", Some(4))?;
        return Ok((1..=layers).map(|i| !i.is_multiple_of(interval)).collect());
    };
    let flags: Option<Vec<bool>> = listed.as_array().and_then(|list| {
        let flag = |v: &serde_json::Value| match v.as_u64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        };
        list.iter().map(flag).collect()
    });
    match flags {
        Some(flags) if flags.len() == layers => Ok(flags),
        _ => Err(config.error(
            "no_rope_layers",
            format!("is {listed}; expected {layers} numbers, 1 for a layer with positions and 0 for one without"),
        )),
    }
}
