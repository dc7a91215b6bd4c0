//! Qwen 2 and 2.5: biases of q, k and v, and a window over the upper layers where `use_sliding_window` says so.

use super::layer_types;
use crate::Result;
use crate::model::{DecoderConfig, HfConfig};

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let common = DecoderConfig::common(config)?;
    Ok(DecoderConfig {
        qkv_bias: true,
        sliding_windows: windows(config, common.layers)?,
        ..common
    })
}

/// Layers from `max_window_layers` on slide, unless `layer_types` says otherwise.
pub(super) fn windows(config: &HfConfig, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match config.flag_or("use_sliding_window", false)? {
        true => layer_types::sliding_window(config, 4096)?,
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
