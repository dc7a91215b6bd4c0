//! Phi 3 and 4 mini: one projection to q, k and v, one to gate and up, and heads that may rotate in part.

use super::layer_types::sliding_window;
use crate::Result;
use crate::model::{DecoderConfig, HfConfig, ModuleNames, RopeConfig};
use serde_json::{Value, json};

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        // Comes before the one in the group, given or not.
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": null,
    }));
    let common = DecoderConfig::without_rope(config)?;
    Ok(DecoderConfig {
        modules: ModuleNames {
            qkv: &["self_attn.qkv_proj"],
            gate_up: &["mlp.gate_up_proj"],
            ..ModuleNames::LLAMA
        },
        ropes: vec![RopeConfig::partial(&renamed(config), common.head_dim)?],
        layer_ropes: vec![Some(0); common.layers],
        sliding_windows: vec![sliding_window(config)?; common.layers],
        ..common
    })
}

/// `su` and `yarn` are what the first checkpoints call longrope.
fn renamed(config: &HfConfig) -> HfConfig {
    let mut config = config.clone();
    for group in ["rope_parameters", "rope_scaling"] {
        let Some(mut rope) = config.get(group).cloned() else {
            continue;
        };
        for key in ["rope_type", "type"] {
            if let Some("su" | "yarn") = rope.get(key).and_then(Value::as_str) {
                rope[key] = json!("longrope");
            }
        }
        config = config.with(group, rope);
    }
    config
}
