//! What a decoder is, in numbers: everything the engine needs to know of an architecture.

use super::classifier::{self, Classifier};
use super::hf_config::HfConfig;
use super::modules::ModuleNames;
use super::rope::RopeConfig;
use crate::io::quantised;
use crate::{Error, Result, models, suggest};
use ferrotune_kernels::DType;
use ferrotune_kernels::activation::Activation;
use serde_json::Value;
use std::path::Path;

/// More layers than any model has. Each takes memory before a weight is looked at.
pub(super) const MAX_LAYERS: usize = 4096;

/// More elements than any weight has: sums of all weights, in bytes, can be counted.
const MAX_ELEMENTS: usize = 1 << 44;

/// Keys of dropout in the base itself, in which Transformers trains it.
const DROPOUT: [&str; 4] = [
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
];

/// Names of activations, as Transformers has them.
const ACTIVATIONS: [(&str, Activation); 11] = [
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_accurate", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_python", Activation::Gelu),
    ("gelu_python_tanh", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("quick_gelu", Activation::QuickGelu),
    ("relu", Activation::Relu),
];

/// What every norm of a model computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm.
    Rms,
    /// RMSNorm whose weights are stored as their distance from 1, as in Gemma.
    RmsOnePlus,
    /// LayerNorm, with a bias.
    Layer,
}

impl NormKind {
    /// Columns of the statistics that one keeps.
    pub(crate) fn statistics(self) -> usize {
        match self {
            Self::Rms | Self::RmsOnePlus => 1,
            Self::Layer => 2,
        }
    }
}

/// Which norm q and k have before RoPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Over each head, with one weight `[head_dim]` for all of them, as in Qwen 3.
    PerHead,
    /// Over all heads together, with a weight for each element, as in OLMo 2.
    Whole,
}

/// Factor of the rows of the embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingScale {
    /// The factor.
    pub factor: f32,
    /// Whether the embedding module itself applies it, as in Gemma: rounded to the dtype of activations, and before
    /// NEFTune's noise, which comes with the module's output.
    pub in_module: bool,
}

impl EmbeddingScale {
    /// The factor of embeddings in `dtype`.
    pub(crate) fn in_dtype(self, dtype: DType) -> f32 {
        match (self.in_module, dtype) {
            (true, DType::Bf16) => half::bf16::from_f32(self.factor).to_f32(),
            _ => self.factor,
        }
    }
}

/// A decoder-only transformer. Architectures differ in these numbers alone.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// `model_type` of the checkpoint.
    pub model_type: String,
    /// Names of its modules; which norms there are, and which linears are fused.
    pub modules: ModuleNames,
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// The layer of the checkpoint whose weights each has: the same one, unless [`DecoderConfig::stacked`].
    pub layer_sources: Vec<usize>,
    /// Number of layers of the checkpoint.
    pub stored_layers: usize,
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
    /// What the mlp applies to its gate, or, without a gate, to what it projects up.
    pub activation: Activation,
    /// Whether the mlp has a gate.
    pub gated_mlp: bool,
    /// What its norms compute.
    pub norm: NormKind,
    /// Added to the mean square, or the variance, in norms.
    pub norm_eps: f32,
    /// Rotary embeddings.
    pub ropes: Vec<RopeConfig>,
    /// Which of the ropes each layer has; `None` rotates nothing.
    pub layer_ropes: Vec<Option<usize>>,
    /// Norm of q and k before RoPE.
    pub qk_norm: Option<QkNorm>,
    /// Factor of q k^T in each layer.
    pub attention_scales: Vec<f32>,
    /// Bound c of the scores, which become `c * tanh(score / c)`.
    pub attention_softcap: Option<f32>,
    /// Window of each layer, in tokens; `None` attends to everything before.
    pub sliding_windows: Vec<Option<usize>>,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub o_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Whether checkpoints hold the linears of layers as `[in, out]`.
    pub stored_transposed: bool,
    /// Factor of the rows of the embedding.
    pub embedding_scale: Option<EmbeddingScale>,
    /// Factor of what a block adds to the stream.
    pub residual_scale: f32,
    /// Factor of the logits.
    pub logits_scale: f32,
    /// Bound c of the logits, which become `c * tanh(logit / c)`.
    pub logits_softcap: Option<f32>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// What makes it a classifier of sequences; `None` predicts tokens.
    pub classifier: Option<Classifier>,
}

impl DecoderConfig {
    /// Reads `directory/config.json` and looks its `model_type` up among the architectures.
    ///
    /// # Errors
    /// [`Error::Model`] naming file, key, value and what was expected.
    pub fn open(directory: &Path) -> Result<Self> {
        Self::from_hf(&HfConfig::open(directory)?)
    }

    /// Whether a config is of a causal language model, or a classifier of sequences, whose `model_type` is among the
    /// architectures.
    #[must_use]
    pub fn covers(config: &HfConfig) -> bool {
        // Saved without its head, a model is of the class that has none.
        let is_causal = |c: &str| c.ends_with("ForCausalLM") || c.ends_with("Model");
        let class = classifier::model_class(config);
        let covered = class.is_none_or(is_causal) || classifier::is_classifier(config);
        models::is_known(config) && covered
    }

    /// The same from a config already read.
    ///
    /// # Errors
    /// [`Error::Model`] naming file, key, value and what was expected.
    pub fn from_hf(config: &HfConfig) -> Result<Self> {
        if !config.flag_or("is_causal", true)? {
            let message = "is false, and attention to what follows is not supported; expected true";
            return Err(config.error("is_causal", message));
        }
        let decoder = models::architecture(config)?;
        let decoder = match Classifier::of(config)? {
            Some(classifier) => decoder.with_classifier(classifier),
            None => decoder,
        };
        decoder.check(config)?;
        Ok(decoder)
    }

    /// The same layers under the head of a classifier, which is never the embedding and has no bounds or factors.
    #[must_use]
    pub fn with_classifier(mut self, classifier: Classifier) -> Self {
        self.modules.head = classifier::HEAD;
        self.tie_word_embeddings = false;
        self.logits_scale = 1.0;
        self.logits_softcap = None;
        self.classifier = Some(classifier);
        self
    }

    /// Rows of the head: of a language model, the vocabulary.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.classifier.map_or(self.vocab_size, |c| c.classes)
    }

    /// The keys that every Llama-like architecture shares, under their common names.
    ///
    /// # Errors
    /// [`Error::Model`] naming file, key, value and what was expected.
    pub fn common(config: &HfConfig) -> Result<Self> {
        let common = Self::without_rope(config)?;
        Ok(Self {
            ropes: vec![RopeConfig::from_hf(config, common.head_dim)?],
            layer_ropes: vec![Some(0); common.layers],
            ..common
        })
    }

    /// [`DecoderConfig::common`] with no layer that rotates.
    ///
    /// # Errors
    /// As there.
    pub fn without_rope(config: &HfConfig) -> Result<Self> {
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
                format!(
                    "is {heads}, which does not divide hidden_size {hidden_size}; {}; or set head_dim",
                    nearest_divisor(heads, hidden_size)
                ),
            ));
        }
        let head_dim = config.size_or("head_dim", Some(hidden_size / heads))?;
        warn_of_dropout(config)?;
        Ok(Self {
            model_type: config.text_or("model_type", "")?.to_owned(),
            modules: ModuleNames::LLAMA,
            hidden_size,
            intermediate_size: config.size("intermediate_size")?,
            layers,
            layer_sources: (0..layers).collect(),
            stored_layers: layers,
            heads,
            kv_heads: config.size_or("num_key_value_heads", Some(heads))?,
            head_dim,
            vocab_size: config.size("vocab_size")?,
            max_position_embeddings: config.size_or("max_position_embeddings", Some(2048))?,
            activation: activation(config, "hidden_act", "silu")?,
            gated_mlp: true,
            norm: NormKind::Rms,
            norm_eps: norm_eps(config, "rms_norm_eps", 1e-6)?,
            ropes: Vec::new(),
            layer_ropes: vec![None; layers],
            qk_norm: None,
            attention_scales: vec![1.0 / (head_dim as f32).sqrt(); layers],
            attention_softcap: None,
            sliding_windows: vec![None; layers],
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            stored_transposed: false,
            embedding_scale: None,
            residual_scale: 1.0,
            logits_scale: 1.0,
            logits_softcap: None,
            tie_word_embeddings: ties(config)?,
            classifier: None,
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

    /// Number of parameters, each that is shared counted once.
    #[must_use]
    pub fn parameters(&self) -> usize {
        super::plan::ModelPlan::new(self)
            .owners()
            .map(|s| s.out_features * s.in_features + if s.bias { s.out_features } else { 0 })
            .sum()
    }

    fn check(&self, config: &HfConfig) -> Result<(), Error> {
        check_quantisation(config)?;
        self.check_sizes(config)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            let key = "num_key_value_heads";
            let default = match config.get(key) {
                Some(_) => "",
                None => " (where it is left out)",
            };
            return Err(config.error(
                key,
                format!(
                    "is {}{default}, which does not divide num_attention_heads {}; {}",
                    self.kv_heads,
                    self.heads,
                    nearest_divisor(self.kv_heads, self.heads)
                ),
            ));
        }
        Ok(())
    }

    /// Refuses sizes whose products are more than any machine could hold, or count.
    fn check_sizes(&self, config: &HfConfig) -> Result<()> {
        let hidden = (["hidden_size", "n_embd"], self.hidden_size);
        let pairs = [
            (
                ["num_attention_heads", "n_head"],
                self.heads,
                (["head_dim"; 2], self.head_dim),
            ),
            (
                ["num_attention_heads", "n_head"],
                self.heads.saturating_mul(self.head_dim),
                hidden,
            ),
            (
                ["intermediate_size", "n_inner"],
                self.intermediate_size,
                hidden,
            ),
            (["vocab_size"; 2], self.vocab_size, hidden),
            (
                ["max_position_embeddings", "n_positions"],
                self.max_position_embeddings,
                hidden,
            ),
        ];
        for (names, size, (by, times)) in pairs {
            if size.checked_mul(times).is_some_and(|n| n <= MAX_ELEMENTS) {
                continue;
            }
            let given = |names: [&'static str; 2]| {
                let known = names.into_iter().find(|key| config.get(key).is_some());
                known.unwrap_or(names[0])
            };
            let (key, by) = (given(names), given(by));
            let message = format!(
                "{size} times {by} {times} is more than {MAX_ELEMENTS}, and no weight has as many elements"
            );
            return Err(config.error(key, message));
        }
        Ok(())
    }
}

/// Refuses a checkpoint that is quantised in another way than those that are read.
fn check_quantisation(config: &HfConfig) -> Result<()> {
    let Some(settings) = config.get("quantization_config") else {
        return Ok(());
    };
    let is = |key: &str| settings.get(key) == Some(&Value::Bool(true));
    if is("llm_int8_has_fp16_weight") {
        let message = "`llm_int8_has_fp16_weight` is true: weights that are quantised anew for every product are \
                       not supported; expected false";
        return Err(config.error("quantization_config", message));
    }
    let text = |key: &str| settings.get(key).and_then(Value::as_str);
    let method = text("quant_method").unwrap_or("bitsandbytes");
    if quantised::reads(settings) {
        return Ok(());
    }
    let format = text("format").map_or_else(String::new, |format| format!(" (format {format})"));
    Err(config.error(
        "quantization_config",
        format!(
            "weights quantised by {method}{format} with load_in_4bit {} and load_in_8bit {} are not supported; \
             supported are bitsandbytes of 4 and 8 bits, fp8, fbgemm_fp8, compressed-tensors of 8-bit floats, gptq, \
             awq and GGUF. Give the checkpoint these were made from, with load_in_4bit or load_in_8bit",
            is("load_in_4bit"),
            is("load_in_8bit")
        ),
    ))
}

fn warn_of_dropout(config: &HfConfig) -> Result<()> {
    for key in DROPOUT {
        let p = config.number_or(key, 0.0)?;
        if p != 0.0 {
            tracing::warn!("{key} of the base is {p} and is ignored: only adapters have dropout");
        }
    }
    Ok(())
}

/// What to write instead of a number that does not divide another.
pub(crate) fn nearest_divisor(wrong: usize, of: usize) -> String {
    let divides = |n: &usize| of.is_multiple_of(*n);
    // Divisors come in pairs: none above the root needs to be looked for.
    let small = || (1..=of.isqrt()).filter(|n| divides(n));
    let all = || small().chain(small().map(|n| of / n));
    let below = all().filter(|n| *n < wrong).max();
    let above = all().filter(|n| *n > wrong).min();
    let nearest: Vec<String> = below.iter().chain(&above).map(usize::to_string).collect();
    format!("the nearest that does: {}", nearest.join(" or "))
}

/// Whether the head is the embedding. A null is not the default of any architecture: Transformers 5 refuses it.
fn ties(config: &HfConfig) -> Result<bool> {
    let key = "tie_word_embeddings";
    match config.keys().get(key) {
        Some(Value::Null) => Err(config.error(key, "is null; expected true or false")),
        _ => config.flag_or(key, false),
    }
}

/// What a norm adds, by its key.
pub(crate) fn norm_eps(config: &HfConfig, key: &str, default: f64) -> Result<f32> {
    let eps = config.number_or(key, default)?;
    if eps < 0.0 {
        let message = format!("is {eps}; expected 0 or more, such as {default:e}");
        return Err(config.error(key, message));
    }
    Ok(eps as f32)
}

/// The activation that `key` names.
pub(crate) fn activation(config: &HfConfig, key: &str, default: &str) -> Result<Activation> {
    let name = config.text_or(key, default)?;
    let known = || ACTIVATIONS.iter().map(|(name, _)| *name);
    match ACTIVATIONS.iter().find(|(n, _)| *n == name) {
        Some((_, activation)) => Ok(*activation),
        None => Err(config.error(
            key,
            format!(
                "`{name}` is not supported{}; supported: {}",
                suggest::did_you_mean(name, known()),
                known().collect::<Vec<_>>().join(", ")
            ),
        )),
    }
}
