//! GPT-2: learned positions, LayerNorm, an mlp without a gate, one projection to q, k and v, and linears
//! stored as `[in, out]`.

use crate::Result;
use crate::model::{
    DecoderConfig, HfConfig, ModuleNames, NormKind, activation, nearest_divisor, norm_eps,
};
use serde_json::json;

const MODULES: ModuleNames = ModuleNames {
    embedding: "transformer.wte",
    positions: Some("transformer.wpe"),
    layers: "transformer.h",
    input_norm: Some("ln_1"),
    qkv: &["attn.c_attn"],
    qk_norm: ["", ""],
    o: "attn.c_proj",
    attention_norm: None,
    mlp_norm: Some("ln_2"),
    gate_up: &["mlp.c_fc"],
    down: "mlp.c_proj",
    mlp_output_norm: None,
    norm: "transformer.ln_f",
    head: "lm_head",
};

pub(super) fn decoder(config: &HfConfig) -> Result<DecoderConfig> {
    config.require_false("add_cross_attention")?;
    let common = DecoderConfig::without_rope(&renamed(config)?)?;
    let scale = match config.flag_or("scale_attn_weights", true)? {
        true => (common.head_dim as f32).sqrt().recip(),
        false => 1.0,
    };
    let divisor = match config.flag_or("scale_attn_by_inverse_layer_idx", false)? {
        true => |layer| layer as f32,
        false => |_| 1.0,
    };
    let scales = (1..=common.layers).map(|layer| scale / divisor(layer));
    Ok(DecoderConfig {
        modules: MODULES,
        activation: activation(config, "activation_function", "gelu_new")?,
        gated_mlp: false,
        norm: NormKind::Layer,
        norm_eps: norm_eps(config, "layer_norm_epsilon", 1e-5)?,
        attention_scales: scales.collect(),
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        stored_transposed: true,
        tie_word_embeddings: config.flag_or("tie_word_embeddings", true)?,
        ..common
    })
}

/// The same under the names that others give these keys, and that Transformers takes here too.
fn renamed(config: &HfConfig) -> Result<HfConfig> {
    let size = |alias, own, default| {
        let own = config.size_or(own, Some(default))?;
        config.size_or(alias, Some(own))
    };
    let hidden = size("hidden_size", "n_embd", 768)?;
    let heads = size("num_attention_heads", "n_head", 12)?;
    if !hidden.is_multiple_of(heads) {
        let alias = "num_attention_heads";
        let key = config.get(alias).map_or("n_head", |_| alias);
        let message = format!(
            "is {heads}, which does not divide n_embd {hidden}; {}",
            nearest_divisor(heads, hidden)
        );
        return Err(config.error(key, message));
    }
    let defaults = config.with_defaults(&json!({
        "vocab_size": 50257,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    }));
    let sizes = [
        ("hidden_size", hidden),
        ("num_attention_heads", heads),
        (
            "num_hidden_layers",
            size("num_hidden_layers", "n_layer", 12)?,
        ),
        (
            "max_position_embeddings",
            size("max_position_embeddings", "n_positions", 1024)?,
        ),
        // The one without another name.
        (
            "intermediate_size",
            config.size_or("n_inner", Some(4 * hidden))?,
        ),
    ];
    let sizes = sizes.into_iter();
    Ok(sizes.fold(defaults, |config, (key, size)| {
        config.with(key, json!(size))
    }))
}
