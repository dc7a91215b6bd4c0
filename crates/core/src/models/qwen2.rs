//! Qwen 2 and 2.5: biases of q, k and v, and a window over the upper layers where `use_sliding_window` says so.

use super::layer_types;
use crate::Result;
use crate::model::{DecoderConfig, HfConfig};
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &with_defaults(config);
    let common = DecoderConfig::common(config)?;
    Ok(DecoderConfig {
        qkv_bias: true,
        sliding_windows: windows(config, common.layers)?,
        ..common
    })
}

/// What the classes of Qwen 2 and 3 have where a config says nothing.
pub(super) fn with_defaults(config: &HfConfig) -> HfConfig {
    config.with_defaults(&json!({
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    }))
}

/// Layers from `max_window_layers` on slide, unless `layer_types` says otherwise.
pub(super) fn windows(config: &HfConfig, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match config.flag_or("use_sliding_window", false)? {
        true => layer_types::sliding_window(config)?,
        false => None,
    };
    let first = match config
        .get("max_window_layers")
        .and_then(serde_json::Value::as_u64)
    {
        // Zero is a number of layers too.
        Some(0) => 0,
        _ => config.size_or("max_window_layers", Some(28))?,
    };
    layer_types::windows(config, layers, window, |layer| layer >= first)
}
