//! What the architectures are, written down from their papers and configs, independently of the engine.

use super::Shape;
use serde_json::{Value, json};

/// An architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Family {
    #[default]
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    SmolLm3,
    Granite,
    Gemma,
    Gemma2,
    Gemma3,
    Olmo2,
    Phi3,
    Gpt2,
}

/// Norms of a layer, where they stand: before and behind the attention block, before and behind the mlp.
pub(crate) type LayerNorms = [Option<&'static str>; 4];

/// Angles per position of each rotated pair, and the factor of cos and sin.
pub(crate) struct Rope {
    pub(crate) frequencies: Vec<f64>,
    pub(crate) scale: f64,
}

/// Window of the layers that slide.
const WINDOW: usize = 4;
/// Context of Phi 3's pre-training, and divisors of its frequencies up to it and beyond.
const ORIGINAL: usize = 9;
const SHORT: [f64; 2] = [1.0, 1.3];
const LONG: [f64; 2] = [1.7, 2.6];

impl Family {
    pub(crate) const ALL: [Self; 12] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::SmolLm3,
        Self::Granite,
        Self::Gemma,
        Self::Gemma2,
        Self::Gemma3,
        Self::Olmo2,
        Self::Phi3,
        Self::Gpt2,
    ];

    /// A tiny model of it.
    pub(crate) fn shape(self) -> Shape {
        let plain = Shape {
            family: self,
            tied: !matches!(
                self,
                Self::Llama | Self::Mistral | Self::Qwen2 | Self::Olmo2 | Self::Phi3
            ),
            ..Shape::default()
        };
        match self {
            Self::Gpt2 => Shape {
                kv_heads: plain.heads,
                hidden_act: "gelu_new",
                ..plain
            },
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => Shape {
                hidden_act: "gelu_pytorch_tanh",
                ..plain
            },
            _ => plain,
        }
    }

    pub(crate) fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::SmolLm3 => "smollm3",
            Self::Granite => "granite",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
            Self::Olmo2 => "olmo2",
            Self::Phi3 => "phi3",
            Self::Gpt2 => "gpt2",
        }
    }

    /// Keys of its config beside those of a Llama.
    pub(crate) fn keys(self, shape: &Shape) -> Value {
        match self {
            Self::Mistral => json!({"sliding_window": WINDOW}),
            Self::Qwen2 => json!({
                "use_sliding_window": true,
                "sliding_window": WINDOW,
                "max_window_layers": 1,
            }),
            Self::SmolLm3 => json!({"no_rope_layer_interval": 2}),
            Self::Granite => json!({
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.25,
                "residual_multiplier": 0.6,
                "logits_scaling": 1.7,
            }),
            Self::Gemma2 => json!({
                "hidden_activation": shape.hidden_act,
                "query_pre_attn_scalar": 11,
                "attn_logit_softcapping": 2.5,
                "final_logit_softcapping": 3.5,
                "sliding_window": WINDOW,
            }),
            Self::Gemma3 => json!({
                "hidden_activation": shape.hidden_act,
                "query_pre_attn_scalar": 11,
                "sliding_window": WINDOW,
                "sliding_window_pattern": 2,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            }),
            Self::Phi3 => json!({
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": ORIGINAL,
                "rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG},
            }),
            Self::Gpt2 => json!({
                "n_embd": shape.hidden,
                "n_inner": shape.intermediate,
                "n_layer": shape.layers,
                "n_head": shape.heads,
                "n_positions": shape.max_position,
                "vocab_size": shape.vocab,
                "activation_function": shape.hidden_act,
                "layer_norm_epsilon": 1e-5,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                "tie_word_embeddings": shape.tied,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }),
            _ => json!({}),
        }
    }

    /// Whether its keys are all there are.
    pub(crate) fn has_own_keys(self) -> bool {
        self == Self::Gpt2
    }

    pub(crate) fn embedding(self) -> &'static str {
        match self {
            Self::Gpt2 => "transformer.wte",
            _ => "model.embed_tokens",
        }
    }

    /// Table of learned positions.
    pub(crate) fn positions(self) -> Option<&'static str> {
        (self == Self::Gpt2).then_some("transformer.wpe")
    }

    pub(crate) fn in_layer(self, layer: usize, module: &str) -> String {
        match self {
            Self::Gpt2 => format!("transformer.h.{layer}.{module}"),
            _ => format!("model.layers.{layer}.{module}"),
        }
    }

    pub(crate) fn final_norm(self) -> &'static str {
        match self {
            Self::Gpt2 => "transformer.ln_f",
            _ => "model.norm",
        }
    }

    pub(crate) fn norms(self) -> LayerNorms {
        match self {
            Self::Gemma2 | Self::Gemma3 => [
                Some("input_layernorm"),
                Some("post_attention_layernorm"),
                Some("pre_feedforward_layernorm"),
                Some("post_feedforward_layernorm"),
            ],
            Self::Olmo2 => [
                None,
                Some("post_attention_layernorm"),
                None,
                Some("post_feedforward_layernorm"),
            ],
            Self::Gpt2 => [Some("ln_1"), None, Some("ln_2"), None],
            _ => [
                Some("input_layernorm"),
                None,
                Some("post_attention_layernorm"),
                None,
            ],
        }
    }

    /// Whether norms subtract the mean and have a bias.
    pub(crate) fn has_layer_norm(self) -> bool {
        self == Self::Gpt2
    }

    /// Added to the weights of norms.
    pub(crate) fn norm_offset(self) -> f64 {
        match self {
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => 1.0,
            _ => 0.0,
        }
    }

    /// Widths of the norms of q and of k.
    pub(crate) fn qk_norms(self, shape: &Shape) -> Option<[usize; 2]> {
        match self {
            Self::Qwen3 | Self::Gemma3 => Some([shape.head_dim; 2]),
            Self::Olmo2 => Some([shape.heads, shape.kv_heads].map(|n| n * shape.head_dim)),
            _ => None,
        }
    }

    /// Projections to q, k and v, output projection, projections of the mlp to its width, and back; with
    /// the columns of each output.
    pub(crate) fn linears(self, shape: &Shape) -> Vec<(&'static str, [usize; 2])> {
        let (hidden, wide) = (shape.hidden, shape.intermediate);
        let [q, kv] = [shape.heads, shape.kv_heads].map(|n| n * shape.head_dim);
        match self {
            Self::Phi3 => vec![
                ("self_attn.qkv_proj", [q + 2 * kv, hidden]),
                ("self_attn.o_proj", [hidden, q]),
                ("mlp.gate_up_proj", [2 * wide, hidden]),
                ("mlp.down_proj", [hidden, wide]),
            ],
            Self::Gpt2 => vec![
                ("attn.c_attn", [q + 2 * kv, hidden]),
                ("attn.c_proj", [hidden, q]),
                ("mlp.c_fc", [wide, hidden]),
                ("mlp.c_proj", [hidden, wide]),
            ],
            _ => vec![
                ("self_attn.q_proj", [q, hidden]),
                ("self_attn.k_proj", [kv, hidden]),
                ("self_attn.v_proj", [kv, hidden]),
                ("self_attn.o_proj", [hidden, q]),
                ("mlp.gate_proj", [wide, hidden]),
                ("mlp.up_proj", [wide, hidden]),
                ("mlp.down_proj", [hidden, wide]),
            ],
        }
    }

    /// Whether the linear of a layer called `name` has a bias, whatever the config says.
    pub(crate) fn has_bias(self, name: &str) -> bool {
        let of_input = ["q_proj", "k_proj", "v_proj"].map(|end| name.ends_with(end));
        self.is_conv1d() || (self == Self::Qwen2 && of_input.contains(&true))
    }

    /// Whether files hold linears of layers as `[in, out]`, with a bias each.
    pub(crate) fn is_conv1d(self) -> bool {
        self == Self::Gpt2
    }

    pub(crate) fn has_gate(self) -> bool {
        self != Self::Gpt2
    }

    pub(crate) fn embedding_scale(self, hidden: usize) -> f64 {
        match self {
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => (hidden as f64).sqrt(),
            Self::Granite => 3.0,
            _ => 1.0,
        }
    }

    pub(crate) fn attention_scale(self, head_dim: usize) -> f64 {
        match self {
            Self::Gemma2 | Self::Gemma3 => 1.0 / 11_f64.sqrt(),
            Self::Granite => 0.25,
            _ => 1.0 / (head_dim as f64).sqrt(),
        }
    }

    /// Factor of what a block adds to the stream.
    pub(crate) fn residual_scale(self) -> f64 {
        match self {
            Self::Granite => 0.6,
            _ => 1.0,
        }
    }

    /// Factor of the logits.
    pub(crate) fn logits_scale(self) -> f64 {
        match self {
            Self::Granite => 1.0 / 1.7,
            _ => 1.0,
        }
    }

    /// Bounds of the scores and of the logits.
    pub(crate) fn softcaps(self) -> [Option<f64>; 2] {
        match self {
            Self::Gemma2 => [Some(2.5), Some(3.5)],
            _ => [None, None],
        }
    }

    /// Keys that a query sees in `layer`.
    pub(crate) fn window(self, layer: usize) -> usize {
        match self {
            Self::Gemma2 | Self::Gemma3 if layer.is_multiple_of(2) => WINDOW,
            Self::Mistral => WINDOW,
            Self::Qwen2 if layer >= 1 => WINDOW,
            _ => usize::MAX,
        }
    }

    /// The rotation in `layer` of a document of `tokens`.
    pub(crate) fn rope(self, shape: &Shape, layer: usize, tokens: usize) -> Rope {
        let plain = |base: f64, rotary: usize| -> Vec<f64> {
            let exponent = |i: usize| (2 * i) as f64 / rotary as f64;
            (0..rotary / 2).map(|i| base.powf(-exponent(i))).collect()
        };
        let width = shape.head_dim;
        let divided = |frequencies: Vec<f64>, divisors: &[f64]| {
            let divisors = divisors.iter().cycle();
            frequencies
                .iter()
                .zip(divisors)
                .map(|(f, d)| f / d)
                .collect()
        };
        let (frequencies, scale) = match self {
            Self::Gpt2 => (Vec::new(), 1.0),
            Self::SmolLm3 if !layer.is_multiple_of(2) => (Vec::new(), 1.0),
            Self::Gemma3 if !layer.is_multiple_of(2) => (divided(plain(1e6, width), &[8.0]), 1.0),
            Self::Phi3 => {
                let divisors = if tokens > ORIGINAL { LONG } else { SHORT };
                let growth = shape.max_position as f64 / ORIGINAL as f64;
                let scale = (1.0 + growth.ln() / (ORIGINAL as f64).ln()).sqrt();
                (divided(plain(1e4, width / 2), &divisors), scale)
            }
            _ => (plain(1e4, width), 1.0),
        };
        Rope { frequencies, scale }
    }
}
