//! Phi 3 and 4 mini: one projection to q, k and v, one to gate and up, and heads that may rotate in part.

use super::layer_types::sliding_window;
use crate::model::{DecoderConfig, HfConfig, ModuleNames, RopeConfig};
use crate::{Result, suggest};
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
    require_long_rope(&renamed(config))?;
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

/// Transformers knows no other scaling of these models.
fn require_long_rope(config: &HfConfig) -> Result<()> {
    for group in ["rope_parameters", "rope_scaling"] {
        let given = config.get(group);
        let kind = given.and_then(|rope| rope.get("rope_type").or_else(|| rope.get("type")));
        match kind.and_then(Value::as_str) {
            None | Some("default" | "longrope") => {}
            Some(other) => {
                let nearest = suggest::did_you_mean(other, ["default", "longrope"]);
                let known = "with this architecture it is `default` or `longrope`";
                let message = format!("is `{other}`; {known}{nearest}");
                return Err(config.error(&format!("{group}.rope_type"), message));
            }
        }
    }
    Ok(())
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
