//! How the rows of prompt tuning start.

use super::config::PromptConfig;
use crate::method::Keys;
use ferrotune_core::adapter::BaseWeights;
use ferrotune_core::data::{SpecialTokens, Tokenizer};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::rng::{Stream, key_for};
use serde_json::{Value, json};
use std::path::Path;

/// `prompt_tuning_init`.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Start {
    /// Normally distributed.
    Random,
    /// Embeddings of tokens drawn from the vocabulary.
    SampleVocab,
    /// Embeddings of a text, repeated or cut to the number of virtual tokens.
    Text {
        text: String,
        /// A directory; the base's by default.
        tokenizer: Option<String>,
    },
}

const KEY: &str = "prompt_tuning_init";

impl Start {
    pub(super) fn read(keys: &mut Keys<'_>) -> Result<Self> {
        keys.require_off("tokenizer_kwargs")?;
        let choices = ["RANDOM", "SAMPLE_VOCAB", "TEXT"];
        let (text, tokenizer) = (
            keys.text("prompt_tuning_init_text")?,
            keys.text("tokenizer_name_or_path")?,
        );
        Ok(match keys.choice(KEY, &choices)? {
            "SAMPLE_VOCAB" => Self::SampleVocab,
            "TEXT" => match text.filter(|text| !text.trim().is_empty()) {
                Some(text) => Self::Text { text, tokenizer },
                None => {
                    let message = "is missing, and prompt_tuning_init TEXT starts from it";
                    return Err(keys.error("prompt_tuning_init_text", message));
                }
            },
            _ => Self::Random,
        })
    }

    pub(super) fn write(&self, put: &mut dyn FnMut(&str, Value)) {
        let (name, text, tokenizer) = match self {
            Self::Random => ("RANDOM", None, None),
            Self::SampleVocab => ("SAMPLE_VOCAB", None, None),
            Self::Text { text, tokenizer } => ("TEXT", Some(text), tokenizer.as_ref()),
        };
        put(KEY, json!(name));
        put("prompt_tuning_init_text", json!(text));
        put("tokenizer_name_or_path", json!(tokenizer));
    }

    /// Gives the rows what they start with of the base.
    pub(super) fn prepare(
        &self,
        config: &PromptConfig,
        rows: ParamId,
        params: &mut FlatBuffer,
        base: &dyn BaseWeights,
    ) -> Result<()> {
        // An adapter that is read has its rows.
        if config.rows_only {
            return Ok(());
        }
        let tokens = match self {
            Self::Random => return Ok(()),
            Self::SampleVocab => sample(config.tokens, base.vocabulary(), params.get(rows)),
            Self::Text { text, tokenizer } => text_tokens(config, text, tokenizer.as_deref())?,
        };
        let values = base.embed(&tokens)?.to_f32_vec();
        params.get_mut(rows).copy_from_slice(&values);
        Ok(())
    }
}

/// Tokens drawn with what the seed made of the first row.
fn sample(count: usize, vocabulary: usize, seeded: &[f32]) -> Vec<u32> {
    let seed = seeded.first().map_or(0, |value| u64::from(value.to_bits()));
    let mut stream = Stream::new(key_for(seed, KEY));
    let token = || ((stream.uniform() * vocabulary as f64) as usize).min(vocabulary - 1) as u32;
    std::iter::repeat_with(token).take(count).collect()
}

/// The text's tokens, repeated or cut to as many as there are virtual ones.
fn text_tokens(config: &PromptConfig, text: &str, tokenizer: Option<&str>) -> Result<Vec<u32>> {
    let base = config.base_model_name_or_path.as_deref();
    let is_there = |path: &&str| Path::new(path).is_dir();
    let Some(directory) = tokenizer.filter(is_there).or(base.filter(is_there)) else {
        let message =
            "is no directory, and neither is the base's name; give the path of a tokenizer";
        return Err(Error::config("peft_config.tokenizer_name_or_path", message));
    };
    let tokenizer = Tokenizer::from_dir(Path::new(directory))?;
    let ids = tokenizer.encode(text, SpecialTokens::Add)?;
    if ids.is_empty() {
        let message = "has no token";
        return Err(Error::config(
            "peft_config.prompt_tuning_init_text",
            message,
        ));
    }
    Ok(ids.iter().copied().cycle().take(config.tokens).collect())
}
