//! What a decoder is, in numbers: everything the engine needs to know of an architecture.

use super::hf_config::HfConfig;
use super::rope::RopeConfig;
use crate::{Error, Result, models, suggest};
use ferrotune_kernels::gated_activation::Activation;
use serde_json::Value;
use std::path::Path;

/// More layers than any model has. Each takes memory before a weight is looked at.
const MAX_LAYERS: usize = 4096;

/// Names of activations, as Transformers has them.
const ACTIVATIONS: [(&str, Activation); 3] = [
    ("silu", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
];

/// RMSNorm over each head of q and of k, with a weight `[head_dim]` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Times the weight, as in Qwen 3.
    Weight,
    /// Times one plus the weight, as in Gemma 3.
    OnePlusWeight,
}

/// A decoder-only transformer. Architectures differ in these numbers alone.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// `model_type` of the checkpoint.
    pub model_type: String,
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// V.
    pub vocab_size: usize,
    /// Longest context the checkpoint was made for, in tokens.
    pub max_position_embeddings: usize,
    /// What the mlp applies to its gate.
    pub activation: Activation,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Whether each layer rotates q and k.
    pub rope_layers: Vec<bool>,
    /// Norm of each head of q and k before RoPE.
    pub qk_norm: Option<QkNorm>,
    /// Factor of q k^T.
    pub attention_scale: f32,
    /// Window of each layer, in tokens; `None` attends to everything before.
    pub sliding_windows: Vec<Option<usize>>,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub o_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
}

impl DecoderConfig {
    /// Reads `directory/config.json` and looks its `model_type` up among the architectures.
    ///
    /// # Errors
    /// [`Error::Model`] naming file, key, value and what was expected.
    pub fn open(directory: &Path) -> Result<Self> {
        Self::from_hf(&HfConfig::open(directory)?)
    }

    /// Whether a config is of a causal language model whose `model_type` is among the architectures.
    #[must_use]
    pub fn covers(config: &HfConfig) -> bool {
        let classes = config.get("architectures").and_then(Value::as_array);
        let class = classes.and_then(|c| c.first()?.as_str());
        models::is_known(config) && class.is_none_or(|c| c.ends_with("ForCausalLM"))
    }

    /// The same from a config already read.
    ///
    /// # Errors
    /// [`Error::Model`] naming file, key, value and what was expected.
    pub fn from_hf(config: &HfConfig) -> Result<Self> {
        let decoder = models::architecture(config)?;
        decoder.check(config)?;
        Ok(decoder)
    }

    /// The keys that every Llama-like architecture shares, under their common names.
    ///
    /// # Errors
    /// [`Error::Model`] naming file, key, value and what was expected.
    pub fn common(config: &HfConfig) -> Result<Self> {
        let hidden_size = config.size("hidden_size")?;
        let heads = config.size("num_attention_heads")?;
        let layers = config.size("num_hidden_layers")?;
        if layers > MAX_LAYERS {
            return Err(config.error(
                "num_hidden_layers",
                format!("is {layers}; expected at most {MAX_LAYERS}"),
            ));
        }
        if config.get("head_dim").is_none() && !hidden_size.is_multiple_of(heads) {
            return Err(config.error(
                "num_attention_heads",
                format!("is {heads}, which does not divide hidden_size {hidden_size}; set head_dim or mend one of them"),
            ));
        }
        let head_dim = config.size_or("head_dim", Some(hidden_size / heads))?;
        Ok(Self {
            model_type: config.text_or("model_type", "")?.to_owned(),
            hidden_size,
            intermediate_size: config.size("intermediate_size")?,
            layers,
            heads,
            kv_heads: config.size_or("num_key_value_heads", Some(heads))?,
            head_dim,
            vocab_size: config.size("vocab_size")?,
            max_position_embeddings: config.size_or("max_position_embeddings", Some(2048))?,
            activation: activation(config)?,
            rms_norm_eps: rms_norm_eps(config)?,
            rope: RopeConfig::from_hf(config, head_dim)?,
            rope_layers: vec![true; layers],
            qk_norm: None,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            sliding_windows: vec![None; layers],
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            tie_word_embeddings: config.flag_or("tie_word_embeddings", false)?,
        })
    }

    /// Width of q for all heads.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of k, and of v, for all heads.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Number of parameters, a tied head counted once.
    #[must_use]
    pub fn parameters(&self) -> usize {
        super::plan::ModelPlan::new(self)
            .sites
            .iter()
            .filter(|s| s.tied_to.is_none())
            .map(|s| s.out_features * s.in_features + if s.bias { s.out_features } else { 0 })
            .sum()
    }

    fn check(&self, config: &HfConfig) -> Result<(), Error> {
        check_quantisation(config)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(config.error(
                "num_key_value_heads",
                format!(
                    "is {}, which does not divide num_attention_heads {}",
                    self.kv_heads, self.heads
                ),
            ));
        }
        Ok(())
    }
}

/// Refuses a checkpoint that is quantised in another way than to bitsandbytes' 4 bits.
fn check_quantisation(config: &HfConfig) -> Result<()> {
    let Some(settings) = config.get("quantization_config") else {
        return Ok(());
    };
    let method = settings.get("quant_method").and_then(Value::as_str);
    let four_bit = settings.get("load_in_4bit") == Some(&Value::Bool(true));
    match (method.unwrap_or("bitsandbytes"), four_bit) {
        ("bitsandbytes", true) => Ok(()),
        (method, _) => Err(config.error(
            "quantization_config",
            format!(
                "weights quantised by {method} with load_in_4bit {four_bit} are not supported; supported are the 4 \
                 bits of bitsandbytes (nf4, fp4). Give the checkpoint these were made from, with load_in_4bit"
            ),
        )),
    }
}

fn rms_norm_eps(config: &HfConfig) -> Result<f32> {
    let eps = config.number_or("rms_norm_eps", 1e-6)?;
    if eps < 0.0 {
        let message = format!("is {eps}; expected 0 or more, such as 1e-6");
        return Err(config.error("rms_norm_eps", message));
    }
    Ok(eps as f32)
}

/// The activation that `hidden_act` names.
fn activation(config: &HfConfig) -> Result<Activation> {
    let name = config.text_or("hidden_act", "silu")?;
    let known = || ACTIVATIONS.iter().map(|(name, _)| *name);
    match ACTIVATIONS.iter().find(|(n, _)| *n == name) {
        Some((_, activation)) => Ok(*activation),
        None => Err(config.error(
            "hidden_act",
            format!(
                "`{name}` is not supported{}; supported: {}",
                suggest::did_you_mean(name, known()),
                known().collect::<Vec<_>>().join(", ")
            ),
        )),
    }
}
