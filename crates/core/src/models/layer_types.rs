//! Which layers slide a window, by the keys that several architectures share.

use crate::model::HfConfig;
use crate::{Error, Result};
use serde_json::Value;

/// The window of each of `layers` layers: by `layer_types` where the config lists them, else by `slides`;
/// none where `window` is none.
///
/// # Errors
/// A `layer_types` of another length, or with a name that is no kind of attention.
pub(super) fn windows(
    config: &HfConfig,
    layers: usize,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    let Some(types) = config.get("layer_types") else {
        return Ok((0..layers).map(|i| window.filter(|_| slides(i))).collect());
    };
    let wrong = |what: String| {
        let expected = "expected `full_attention` or `sliding_attention` for each layer";
        config.error("layer_types", format!("{what}; {expected}"))
    };
    let types = types
        .as_array()
        .ok_or_else(|| wrong(format!("is {types}")))?;
    if types.len() != layers {
        let what = format!("has {} entries for {layers} layers", types.len());
        return Err(wrong(what));
    }
    let window_of = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => match window {
            Some(window) => Ok(Some(window)),
            None => Err(no_window(config)),
        },
        _ => Err(wrong(format!("has {kind}"))),
    };
    types.iter().map(window_of).collect()
}

/// What to say of sliding layers without a window.
fn no_window(config: &HfConfig) -> Error {
    let key = "sliding_window";
    let what = match config.keys().get(key) {
        None => "is missing",
        Some(Value::Null) => "is null",
        Some(_) => {
            let message = "is not true, but layer_types has sliding layers; set it, or make them full_attention";
            return config.error("use_sliding_window", message);
        }
    };
    let expected = "expected a number of tokens, or full_attention alone";
    config.error(
        key,
        format!("{what}, but layer_types has sliding layers; {expected}"),
    )
}

/// `sliding_window`: a number, or none where it is null.
///
/// # Errors
/// If it is no positive integer.
pub(super) fn sliding_window(config: &HfConfig) -> Result<Option<usize>> {
    let window = config.get("sliding_window");
    window.map(|_| config.size("sliding_window")).transpose()
}
