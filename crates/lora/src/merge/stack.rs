//! The configuration of a checkpoint whose layers are stacked anew (`layer_replication`).

use ferrotune_core::model::{DecoderConfig, HfConfig};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Keys with one entry for each layer.
const BY_LAYER: [&str; 2] = ["layer_types", "no_rope_layers"];

/// Turns the keys of the base's config, read from `path`, into those of `stack`.
///
/// # Errors
/// [`Error::Model`] if no keys of this architecture say what its layers are.
pub(super) fn restack(
    path: &Path,
    keys: &mut Map<String, Value>,
    stack: &DecoderConfig,
) -> Result<()> {
    let count = match keys.contains_key("n_layer") {
        true => "n_layer",
        false => "num_hidden_layers",
    };
    keys.insert(count.into(), json!(stack.layers));
    for key in BY_LAYER {
        if let Some(Value::Array(entries)) = keys.get_mut(key) {
            let entry = |&source: &usize| entries.get(source).cloned().unwrap_or_default();
            *entries = stack.layer_sources.iter().map(entry).collect();
        }
    }
    if describes(path, keys, stack) {
        return Ok(());
    }
    // Windows and ropes that followed from a layer's number have to be written down.
    let kind = |window: &Option<usize>| match window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    let kinds: Vec<&str> = stack.sliding_windows.iter().map(kind).collect();
    keys.insert("layer_types".into(), json!(kinds));
    if stack.layer_ropes.contains(&None) {
        let flags = stack.layer_ropes.iter().map(|r| u8::from(r.is_some()));
        keys.insert("no_rope_layers".into(), flags.collect());
    }
    if describes(path, keys, stack) {
        return Ok(());
    }
    Err(Error::model(
        path,
        format!(
            "no keys of `{}` describe its layers in the order of `layer_replication`; use the adapter beside its \
             base instead of merging it",
            stack.model_type
        ),
    ))
}

/// Whether these keys are read as a checkpoint of its own that is `stack`.
fn describes(path: &Path, keys: &Map<String, Value>, stack: &DecoderConfig) -> bool {
    let own = DecoderConfig {
        layer_sources: (0..stack.layers).collect(),
        stored_layers: stack.layers,
        ..stack.clone()
    };
    let config = HfConfig::from_value(path, Value::Object(keys.clone()));
    config
        .and_then(|config| DecoderConfig::from_hf(&config))
        .is_ok_and(|read| read == own)
}
