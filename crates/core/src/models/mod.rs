//! Architectures. Each file states how one differs from the common decoder; adding one is a file
//! and a line of [`ARCHITECTURES`].

mod gemma;
mod gemma2;
mod gemma3_text;
mod gpt2;
mod granite;
mod layer_types;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod smollm3;
#[cfg(test)]
mod tests;

use crate::model::{DecoderConfig, HfConfig};
use crate::{Result, suggest};

/// Turns the keys of a `config.json` into a decoder.
type Build = fn(&HfConfig) -> Result<DecoderConfig>;

/// `model_type` and how to read it.
const ARCHITECTURES: &[(&str, Build)] = &[
    ("gemma", gemma::decoder),
    ("gemma2", gemma2::decoder),
    ("gemma3_text", gemma3_text::decoder),
    ("gpt2", gpt2::decoder),
    ("granite", granite::decoder),
    ("llama", llama::decoder),
    ("mistral", mistral::decoder),
    ("olmo2", olmo2::decoder),
    ("phi3", phi3::decoder),
    ("qwen2", qwen2::decoder),
    ("qwen3", qwen3::decoder),
    ("smollm3", smollm3::decoder),
];

/// Whether the `model_type` of a config is one of [`ARCHITECTURES`].
pub(crate) fn is_known(config: &HfConfig) -> bool {
    let name = config.text_or("model_type", "").unwrap_or_default();
    ARCHITECTURES.iter().any(|(known, _)| *known == name)
}

/// The decoder of a config, by its `model_type`.
pub(crate) fn architecture(config: &HfConfig) -> Result<DecoderConfig> {
    let name = config.text_or("model_type", "")?;
    let known = || ARCHITECTURES.iter().map(|(name, _)| *name);
    if name.is_empty() {
        let message = format!(
            "is missing; expected one of {}",
            known().collect::<Vec<_>>().join(", ")
        );
        return Err(config.error("model_type", message));
    }
    match ARCHITECTURES.iter().find(|(n, _)| *n == name) {
        Some((_, build)) => build(config),
        None => Err(config.error(
            "model_type",
            format!(
                "`{name}` is not supported{}; supported: {}",
                nearest(name),
                known().collect::<Vec<_>>().join(", ")
            ),
        )),
    }
}

/// What to say of a `model_type` that is none: the part of it that is text, or what is spelt alike.
fn nearest(name: &str) -> String {
    let known = || ARCHITECTURES.iter().map(|(known, _)| *known);
    let is_text = |known: &&str| known.strip_suffix("_text") == Some(name);
    match known().find(is_text) {
        Some(text) => {
            format!("; did you mean `{text}`, whose config is the `text_config` of a `{name}`?")
        }
        None => suggest::did_you_mean(name, known()),
    }
}
