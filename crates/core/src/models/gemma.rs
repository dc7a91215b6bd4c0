//! Gemma: GeGLU, norms whose weights are distances from 1, an embedding scaled by the root of its width.

use crate::Result;
use crate::model::{DecoderConfig, EmbeddingScale, HfConfig, NormKind, activation};
use ferrotune_kernels::activation::Activation;
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    }));
    let activation = match config.text_or("hidden_act", "gelu")? {
        // The first checkpoints say so and mean its approximation, as Transformers takes them.
        "gelu" => Activation::GeluTanh,
        _ => activation(config, "hidden_act", "gelu")?,
    };
    Ok(DecoderConfig {
        activation,
        ..common(config)?
    })
}

/// What all generations of Gemma share. Their keys of the activation differ.
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
            in_module: true,
        }),
        ..common
    })
}
