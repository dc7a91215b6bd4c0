//! Granite: factors of embeddings, scores, what blocks add, and logits.

use crate::Result;
use crate::model::{DecoderConfig, EmbeddingScale, HfConfig};
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
    let common = DecoderConfig::common(config)?;
    let factor = |key| -> Result<f32> { Ok(config.positive(key)?.unwrap_or(1.0) as f32) };
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: config.flag_or("mlp_bias", false)?,
        attention_scales: vec![factor("attention_multiplier")?; common.layers],
        embedding_scale: Some(EmbeddingScale {
            factor: factor("embedding_multiplier")?,
            in_module: false,
        }),
        residual_scale: factor("residual_multiplier")?,
        logits_scale: factor("logits_scaling")?.recip(),
        ..common
    })
}
