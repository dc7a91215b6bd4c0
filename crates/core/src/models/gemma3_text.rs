//! Gemma 3, text alone: norms of q and k, and a window and a rope of their own in five of six layers.

use super::gemma2;
use crate::Result;
use crate::model::{DecoderConfig, HfConfig, QkNorm, RopeConfig};
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    }));
    let pattern = config.size_or("sliding_window_pattern", Some(6))?;
    let common = gemma2::common(config, |layer| !(layer + 1).is_multiple_of(pattern))?;
    let rope = |kind, theta| RopeConfig::of_layers(config, common.head_dim, kind, theta);
    let ropes = vec![
        rope("full_attention", ("rope_theta", 1e6))?,
        rope("sliding_attention", ("rope_local_base_freq", 1e4))?,
    ];
    let rope_of = |window: &Option<usize>| Some(usize::from(window.is_some()));
    Ok(DecoderConfig {
        qk_norm: Some(QkNorm::PerHead),
        // The config has the key of Gemma 2, and Transformers computes nothing with it.
        attention_softcap: None,
        layer_ropes: common.sliding_windows.iter().map(rope_of).collect(),
        ropes,
        ..common
    })
}
