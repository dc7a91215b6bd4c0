//! Names of a checkpoint's modules. Which of them an architecture has says where its norms stand and
//! which of its linears are fused.

/// Module paths as the checkpoint has them: the first ones whole, those of a layer behind
/// `layers.NUMBER.`. What is `None` is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleNames {
    /// Table of token embeddings.
    pub embedding: &'static str,
    /// Table of learned positions.
    pub positions: Option<&'static str>,
    /// What stands before the number of a layer.
    pub layers: &'static str,
    /// Norm of what the attention block reads.
    pub input_norm: Option<&'static str>,
    /// Projections to q, k and v: three, or one that writes them side by side.
    pub qkv: &'static [&'static str],
    /// Norms of q and of k, where there are such.
    pub qk_norm: [&'static str; 2],
    /// Output projection of the attention block.
    pub o: &'static str,
    /// Norm of what the attention block adds to the stream.
    pub attention_norm: Option<&'static str>,
    /// Norm of what the mlp reads.
    pub mlp_norm: Option<&'static str>,
    /// Projections to gate and up: two, or one that writes them side by side, or, without a gate, one.
    pub gate_up: &'static [&'static str],
    /// Output projection of the mlp.
    pub down: &'static str,
    /// Norm of what the mlp adds to the stream.
    pub mlp_output_norm: Option<&'static str>,
    /// Norm of the stream after the last layer.
    pub norm: &'static str,
    /// Output head.
    pub head: &'static str,
}

impl ModuleNames {
    /// Those of Llama and most others: a norm before each block.
    pub const LLAMA: Self = Self {
        embedding: "model.embed_tokens",
        positions: None,
        layers: "model.layers",
        input_norm: Some("input_layernorm"),
        qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        qk_norm: ["self_attn.q_norm", "self_attn.k_norm"],
        o: "self_attn.o_proj",
        attention_norm: None,
        mlp_norm: Some("post_attention_layernorm"),
        gate_up: &["mlp.gate_proj", "mlp.up_proj"],
        down: "mlp.down_proj",
        mlp_output_norm: None,
        norm: "model.norm",
        head: "lm_head",
    };

    /// Those of Gemma 2 and 3: norms before and behind each block.
    pub const BOTH_NORMS: Self = Self {
        attention_norm: Some("post_attention_layernorm"),
        mlp_norm: Some("pre_feedforward_layernorm"),
        mlp_output_norm: Some("post_feedforward_layernorm"),
        ..Self::LLAMA
    };
}
