//! Mistral 7B and its successors: Llama with a window over every layer.

use super::layer_types::sliding_window;
use crate::Result;
use crate::model::{DecoderConfig, HfConfig};

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    let common = DecoderConfig::common(config)?;
    Ok(DecoderConfig {
        sliding_windows: vec![sliding_window(config, 4096)?; common.layers],
        ..common
    })
}
