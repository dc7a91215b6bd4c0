//! What the architectures are, written down from their papers and configs, independently of the engine.

use serde_json::{Value, json};

/// An architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Family {
    #[default]
    Llama,
    Qwen3,
    Gemma,
    Gemma2,
    Gemma3,
}

/// Norms of a layer, where they stand: before and behind the attention block, before and behind the mlp.
pub(crate) type LayerNorms = [Option<&'static str>; 4];

/// Window of the layers that slide.
const WINDOW: usize = 4;

impl Family {
    pub(crate) const ALL: [Self; 5] = [
        Self::Llama,
        Self::Qwen3,
        Self::Gemma,
        Self::Gemma2,
        Self::Gemma3,
    ];

    pub(crate) fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
        }
    }

    /// Keys of its config beside those of a Llama; null takes one away.
    pub(crate) fn keys(self, hidden_act: &str) -> Value {
        match self {
            Self::Llama | Self::Qwen3 | Self::Gemma => json!({}),
            Self::Gemma2 => json!({
                "hidden_activation": hidden_act,
                "query_pre_attn_scalar": 11,
                "attn_logit_softcapping": 2.5,
                "final_logit_softcapping": 3.5,
                "sliding_window": WINDOW,
            }),
            Self::Gemma3 => json!({
                "hidden_activation": hidden_act,
                "query_pre_attn_scalar": 11,
                "sliding_window": WINDOW,
                "sliding_window_pattern": 2,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            }),
        }
    }

    pub(crate) fn norms(self) -> LayerNorms {
        match self {
            Self::Llama | Self::Qwen3 | Self::Gemma => [
                Some("input_layernorm"),
                None,
                Some("post_attention_layernorm"),
                None,
            ],
            Self::Gemma2 | Self::Gemma3 => [
                Some("input_layernorm"),
                Some("post_attention_layernorm"),
                Some("pre_feedforward_layernorm"),
                Some("post_feedforward_layernorm"),
            ],
        }
    }

    /// Added to the weights of norms.
    pub(crate) fn norm_offset(self) -> f64 {
        match self {
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => 1.0,
            _ => 0.0,
        }
    }

    /// Whether the heads of q and k have a norm.
    pub(crate) fn has_qk_norm(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Gemma3)
    }

    pub(crate) fn embedding_scale(self, hidden: usize) -> f64 {
        match self {
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => (hidden as f64).sqrt(),
            _ => 1.0,
        }
    }

    pub(crate) fn attention_scale(self, head_dim: usize) -> f64 {
        match self {
            Self::Gemma2 | Self::Gemma3 => 1.0 / 11_f64.sqrt(),
            _ => 1.0 / (head_dim as f64).sqrt(),
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
            _ => usize::MAX,
        }
    }

    /// Base of the frequencies in `layer`, and divisor of positions.
    pub(crate) fn rope(self, layer: usize) -> [f64; 2] {
        match self {
            Self::Gemma3 if !layer.is_multiple_of(2) => [1e6, 8.0],
            _ => [1e4, 1.0],
        }
    }
}
