//! Llama 1 to 3.x, and everything that calls itself `llama` (SmolLM, TinyLlama, Yi, ...).

use crate::Result;
use crate::model::{DecoderConfig, HfConfig};
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    }));
    let attention_bias = config.flag_or("attention_bias", false)?;
    if config.size_or("pretraining_tp", Some(1))? != 1 {
        // Sliced matmuls of a long gone code path; the result is the same up to rounding.
        tracing::warn!("pretraining_tp is ignored");
    }
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: config.flag_or("mlp_bias", false)?,
        ..DecoderConfig::common(config)?
    })
}
