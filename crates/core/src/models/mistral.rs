//! Mistral 7B and its successors: Llama with a window over every layer, or over those that `layer_types` names, as
//! in Ministral.

use super::layer_types;
use crate::Result;
use crate::model::{DecoderConfig, HfConfig};
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    }));
    let common = DecoderConfig::common(config)?;
    let window = layer_types::sliding_window(config)?;
    Ok(DecoderConfig {
        sliding_windows: layer_types::windows(config, common.layers, window, |_| true)?,
        ..common
    })
}
