//! OLMo 2: norms behind each block and none before it, and a norm of q and of k over all heads.

use crate::Result;
use crate::model::{DecoderConfig, HfConfig, ModuleNames, QkNorm};
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }));
    let attention_bias = config.flag_or("attention_bias", false)?;
    Ok(DecoderConfig {
        modules: ModuleNames {
            input_norm: None,
            attention_norm: Some("post_attention_layernorm"),
            mlp_norm: None,
            mlp_output_norm: Some("post_feedforward_layernorm"),
            ..ModuleNames::LLAMA
        },
        qk_norm: Some(QkNorm::Whole),
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        ..DecoderConfig::common(config)?
    })
}
