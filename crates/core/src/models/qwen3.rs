//! Qwen 3, dense: a norm over each head of q and k, biases where `attention_bias` says so.

use super::qwen2;
use crate::Result;
use crate::model::{DecoderConfig, HfConfig, QkNorm};
use serde_json::json;

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let config = &qwen2::with_defaults(config).with_defaults(&json!({"head_dim": 128}));
    let common = DecoderConfig::common(config)?;
    let attention_bias = config.flag_or("attention_bias", false)?;
    Ok(DecoderConfig {
        qk_norm: Some(QkNorm::PerHead),
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        sliding_windows: qwen2::windows(config, common.layers)?,
        ..common
    })
}
