//! Gemma 2: norms on both sides of each block, bounded scores and logits, a window over every other layer.

use super::{gemma, layer_types};
use crate::Result;
use crate::model::{DecoderConfig, HfConfig, ModuleNames, activation};
use serde_json::{Value, json};

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &config.with_defaults(&json!({
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }));
    common(config, |layer| layer.is_multiple_of(2))
}

/// What Gemma 2 and 3 share; `slides` says which layers have a window where `layer_types` does not.
pub(super) fn common(config: &HfConfig, slides: impl Fn(usize) -> bool) -> Result<DecoderConfig> {
    let common = gemma::common(config)?;
    let window = layer_types::sliding_window(config)?;
    let key = "query_pre_attn_scalar";
    if config.get(key).is_some_and(Value::is_null) {
        return Err(config.error(
            key,
            "is null; expected a number above 0, such as the head size",
        ));
    }
    let scalar = config.positive(key)?.unwrap_or(256.0);
    let softcap = |key| -> Result<Option<f32>> { Ok(config.positive(key)?.map(|c| c as f32)) };
    Ok(DecoderConfig {
        modules: ModuleNames::BOTH_NORMS,
        activation: activation(config, "hidden_activation", "gelu_pytorch_tanh")?,
        attention_scales: vec![scalar.sqrt().recip() as f32; common.layers],
        attention_softcap: softcap("attn_logit_softcapping")?,
        logits_softcap: softcap("final_logit_softcapping")?,
        sliding_windows: layer_types::windows(config, common.layers, window, slides)?,
        ..common
    })
}
