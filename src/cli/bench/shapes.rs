//! Model shapes by name, as the `config.json` a Hugging Face model of that shape would have.

use crate::cli::Failure;
use ferrotune::core::model::{DecoderConfig, HfConfig};
use ferrotune::core::suggest;
use serde_json::{Value, json};
use std::path::Path;

/// A Llama of random weights, and the batch it is usually measured with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    /// Shorter name used in tables.
    alias: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    tied: bool,
    rope_theta: f64,
    /// Rows of a step, and tokens of a row.
    pub(super) batch: usize,
    pub(super) seq: usize,
}

/// `[hidden, intermediate, layers, heads, kv_heads, vocab]`.
type Sizes = [usize; 6];

const fn shape(
    [name, alias]: [&'static str; 2],
    [hidden, intermediate, layers, heads, kv_heads, vocab]: Sizes,
    tied: bool,
    rope_theta: f64,
    [batch, seq]: [usize; 2],
) -> Shape {
    Shape {
        name,
        alias,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        vocab,
        tied,
        rope_theta,
        batch,
        seq,
    }
}

/// Parameters, a tied head counted once: 0.2 M, 5.0 M, 124.7 M, 134.5 M (SmolLM), 361.8 M (SmolLM),
/// 1235.8 M (Llama 3.2), 8030.3 M (Llama 3.1), 8946.6 M (8 of the 80 layers of Llama 3.1 70B).
const SHAPES: [Shape; 8] = [
    shape(
        ["tiny", "tiny"],
        [64, 192, 2, 4, 2, 1024],
        true,
        1e4,
        [4, 64],
    ),
    shape(
        ["256x4", "S"],
        [256, 688, 4, 4, 2, 8192],
        true,
        1e4,
        [4, 256],
    ),
    shape(
        ["768x12", "M"],
        [768, 2048, 12, 12, 4, 32000],
        false,
        1e4,
        [4, 256],
    ),
    shape(
        ["135M", "135M"],
        [576, 1536, 30, 9, 3, 49152],
        true,
        1e4,
        [4, 256],
    ),
    shape(
        ["360M", "360M"],
        [960, 2560, 32, 15, 5, 49152],
        true,
        1e4,
        [4, 256],
    ),
    shape(
        ["1B", "L"],
        [2048, 8192, 16, 32, 8, 128_256],
        true,
        5e5,
        [1, 512],
    ),
    shape(
        ["8B", "8B"],
        [4096, 14336, 32, 32, 8, 128_256],
        false,
        5e5,
        [1, 512],
    ),
    shape(
        ["70Bx8", "70Bx8"],
        [8192, 28672, 8, 64, 8, 128_256],
        false,
        5e5,
        [1, 512],
    ),
];

impl Shape {
    /// The shape called `name`, in any case.
    pub(super) fn find(name: &str) -> Result<Self, Failure> {
        let is =
            |s: &&Shape| s.name.eq_ignore_ascii_case(name) || s.alias.eq_ignore_ascii_case(name);
        SHAPES.iter().find(is).copied().ok_or_else(|| {
            let names: Vec<&str> = SHAPES.iter().map(|s| s.name).collect();
            Failure::Usage(format!(
                "--shape `{name}` is not known{}; known: {} (S, M, L mean 256x4, 768x12, 1B)",
                suggest::did_you_mean(name, names.iter().copied()),
                names.join(", ")
            ))
        })
    }

    /// The keys of `config.json`, under the names that both 4.x and 5.x of Transformers read.
    pub(super) fn hf_config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden / self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
        })
    }

    /// The same as the engine reads it.
    pub(super) fn decoder(&self) -> Result<DecoderConfig, Failure> {
        let config = HfConfig::from_value(Path::new(self.name), self.hf_config())?;
        Ok(DecoderConfig::from_hf(&config)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_parameters_they_are_known_for() {
        let millions = |name: &str| {
            let shape = Shape::find(name).expect("a known shape");
            let parameters = shape.decoder().expect("a valid config").parameters();
            (parameters as f64 / 1e5).round() / 10.0
        };
        for (name, expected) in [
            ("tiny", 0.2),
            ("S", 5.0),
            ("M", 124.7),
            ("135M", 134.5),
            ("360M", 361.8),
            ("L", 1235.8),
            ("8B", 8030.3),
            ("70Bx8", 8946.6),
        ] {
            assert_eq!(millions(name), expected, "{name}");
        }
    }

    #[test]
    fn an_unknown_shape_is_refused_with_the_nearest() {
        let message = Shape::find("768x21").expect_err("unknown").to_string();
        assert!(message.contains("768x12"), "{message}");
    }
}
