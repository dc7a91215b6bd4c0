//! Gemma: GeGLU, norms whose weights are distances from 1, an embedding scaled by the root of its width.

use crate::Result;
use crate::model::{DecoderConfig, EmbeddingScale, HfConfig, NormKind};
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let mut config = config.with_defaults(&json!({"hidden_act": "gelu_pytorch_tanh"}));
    if config.text_or("hidden_act", "")? == "gelu" {
        // The first checkpoints say so and mean its approximation, as Transformers takes them.
        config = config.with("hidden_act", json!("gelu_pytorch_tanh"));
    }
    common(&config)
}

/// What all generations of Gemma share. `hidden_act` is there.
pub(super) fn common(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({"head_dim": 256, "tie_word_embeddings": true}));
    config.require_false("use_bidirectional_attention")?;
    let common = DecoderConfig::common(config)?;
    let attention_bias = config.flag_or("attention_bias", false)?;
    Ok(DecoderConfig {
        norm: NormKind::RmsOnePlus,
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        embedding_scale: Some(EmbeddingScale {
            factor: (common.hidden_size as f32).sqrt(),
            rounded: true,
        }),
        ..common
    })
}
