//! Names of tensors: llama.cpp's, and those of Transformers.

/// Outside of layers.
const OUTSIDE: [(&str, &str); 3] = [
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];

/// Inside of layers.
const INSIDE: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The name in Transformers of tensor `own`.
pub(super) fn of(own: &str) -> Option<String> {
    let (module, suffix) = own.rsplit_once('.')?;
    if !["weight", "bias"].contains(&suffix) {
        return None;
    }
    let find = |names: &[(&str, &'static str)], of: &str| {
        let found = names.iter().find(|(name, _)| *name == of);
        found.map(|(_, module)| *module)
    };
    match module.strip_prefix("blk.") {
        None => Some(format!("{}.{suffix}", find(&OUTSIDE, module)?)),
        Some(rest) => {
            let (layer, module) = rest.split_once('.')?;
            let layer: usize = layer.parse().ok()?;
            Some(format!(
                "model.layers.{layer}.{}.{suffix}",
                find(&INSIDE, module)?
            ))
        }
    }
}

/// The module of tensor `own` in its layer.
pub(super) fn projection(own: &str) -> Option<&str> {
    own.strip_prefix("blk.")?.split('.').nth(1)
}
