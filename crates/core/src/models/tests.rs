//! What a config says wrongly is named: file, key, value, and what would do.

use super::architecture;
use crate::model::{DecoderConfig, HfConfig, RopeScaling};
use ferrotune_kernels::activation::Activation;
use serde_json::{Value, json};
use std::path::Path;

/// What Transformers' classes have, recorded by `tests/fixtures/make_config_defaults.py`.
const CLASSES: &str = include_str!("../../../../tests/fixtures/config_defaults.json");

/// A config of `model_type` with keys on top.
fn config(model_type: &str, keys: &Value) -> HfConfig {
    let config = json!({
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 99,
        "max_position_embeddings": 128,
    });
    let read = |value| HfConfig::from_value(Path::new("config.json"), value).expect("an object");
    read(keys.clone()).with_defaults(&config)
}

#[track_caller]
fn decoder(model_type: &str, keys: &Value) -> DecoderConfig {
    DecoderConfig::from_hf(&config(model_type, keys)).expect("a valid config")
}

/// The message names the file and holds each of `parts`.
#[track_caller]
fn assert_refused(model_type: &str, keys: &Value, parts: &[&str]) {
    let refused = DecoderConfig::from_hf(&config(model_type, keys));
    let message = refused.expect_err("must be refused").to_string();
    for part in [&["config.json"], parts].concat() {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn an_unknown_model_type_is_refused_with_the_nearest() {
    let parts = [
        "model_type",
        "`gemma2_text`",
        "did you mean `gemma",
        "gpt2",
        "olmo2",
    ];
    assert_refused("gemma2_text", &json!({}), &parts);
}

#[test]
fn the_text_of_a_model_that_has_more_is_suggested() {
    let parts = ["`gemma3`", "did you mean `gemma3_text`", "`text_config`"];
    assert_refused("gemma3", &json!({}), &parts);
}

#[test]
fn layers_of_smollm3_slide_where_they_are_listed_whatever_the_flag_says() {
    let types = [
        "sliding_attention",
        "full_attention",
        "full_attention",
        "sliding_attention",
    ];
    let listed = json!({"use_sliding_window": false, "sliding_window": 7, "layer_types": types});
    let windows = decoder("smollm3", &listed).sliding_windows;
    assert_eq!(windows, [Some(7), None, None, Some(7)]);
    let not_listed = json!({"use_sliding_window": false, "sliding_window": 7});
    assert_eq!(decoder("smollm3", &not_listed).sliding_windows, [None; 4]);
}

#[test]
fn sliding_layers_without_a_window_are_refused_with_what_is_there() {
    let with = |window: Value| json!({"sliding_window": window, "layer_types": vec!["sliding_attention"; 4]});
    let parts = ["`sliding_window`: is null", "full_attention"];
    assert_refused("mistral", &with(Value::Null), &parts);
    let parts = ["`use_sliding_window`: is not true", "sliding layers"];
    assert_refused("qwen2", &with(json!(7)), &parts);
    let missing = json!({"layer_types": vec!["sliding_attention"; 4]});
    assert_refused("smollm3", &missing, &["`sliding_window`: is missing"]);
}

#[test]
fn a_missing_model_type_is_refused_as_missing() {
    let keys = json!({"model_type": null});
    assert_refused("", &keys, &["`model_type`: is missing", "llama", "olmo2"]);
}

#[test]
fn ropes_that_cannot_be_are_refused_with_what_would_do() {
    let rope = |keys: Value| json!({"rope_parameters": keys});
    let swapped = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
    });
    let parts = ["low_freq_factor", "is 4", "high_freq_factor 1", "1 and 4"];
    assert_refused("llama", &rope(swapped), &parts);
    let bare = json!({"rope_type": "yarn"});
    assert_refused("llama", &rope(bare), &["factor", "is missing"]);
    // The context of pre-training, inside or outside of the group, says the factor of YaRN.
    for keys in [
        json!({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 32}}),
        json!({"rope_scaling": {"type": "yarn"}, "original_max_position_embeddings": 32}),
    ] {
        let rope = decoder("llama", &keys).ropes.remove(0);
        let RopeScaling::Yarn { factor, .. } = rope.scaling else {
            panic!("{rope:?}")
        };
        assert_eq!(factor, 4.0);
    }
}

#[test]
fn heads_that_do_not_divide_are_refused_with_the_nearest_that_do() {
    let parts = [
        "num_key_value_heads",
        "is 3",
        "num_attention_heads 4",
        "2 or 4",
    ];
    assert_refused("olmo2", &json!({"num_key_value_heads": 3}), &parts);
    let keys = json!({"num_attention_heads": 5, "head_dim": null});
    let parts = ["num_attention_heads", "is 5", "hidden_size 32", "4 or 8"];
    assert_refused("llama", &keys, &parts);
    let keys = json!({"hidden_size": null, "num_attention_heads": null, "n_embd": 32, "n_head": 5});
    assert_refused("gpt2", &keys, &["n_head", "is 5", "n_embd 32", "4 or 8"]);
    let keys = json!({"num_attention_heads": 5});
    assert_refused("gpt2", &keys, &["num_attention_heads", "is 5", "4 or 8"]);
    let left_out = json!({"model_type": "mistral", "num_attention_heads": 12, "head_dim": 8});
    let config = HfConfig::from_value(Path::new("config.json"), left_out).expect("an object");
    let error = DecoderConfig::from_hf(&config)
        .expect_err("8 of 12")
        .to_string();
    assert!(error.contains("is 8 (where it is left out)"), "{error}");
}

#[test]
fn sizes_beyond_counting_are_refused_by_their_keys() {
    let most = (1_u64 << 40) - 1;
    for (model_type, keys, parts) in [
        (
            "llama",
            json!({"num_attention_heads": most, "head_dim": most - 1, "num_key_value_heads": 1}),
            ["num_attention_heads", "head_dim 1099511627774"],
        ),
        (
            "llama",
            json!({"head_dim": most - 1, "hidden_size": most}),
            ["num_attention_heads", "hidden_size 1099511627775"],
        ),
        (
            "qwen3",
            json!({"intermediate_size": most}),
            ["intermediate_size", "1099511627775 times"],
        ),
        (
            "gemma",
            json!({"vocab_size": most}),
            ["vocab_size", "hidden_size 32"],
        ),
        (
            "gpt2",
            json!({"n_positions": most, "max_position_embeddings": most}),
            ["max_position_embeddings", "more than"],
        ),
    ] {
        assert_refused(model_type, &keys, &parts);
    }
}

#[test]
fn an_unknown_rope_type_is_refused_with_the_nearest() {
    let keys = json!({"rope_parameters": {"rope_type": "longropes"}});
    let parts = [
        "rope_parameters.rope_type",
        "`longropes`",
        "did you mean `longrope`",
    ];
    assert_refused("phi3", &keys, &parts);
    let nested = json!({"rope_parameters": {"full_attention": {"rope_type": "liner"}}});
    let parts = [
        "rope_parameters.full_attention.rope_type",
        "`liner`",
        "`linear`",
    ];
    assert_refused("gemma3_text", &nested, &parts);
}

#[test]
fn divisors_of_longrope_are_one_per_pair() {
    let rope = |short: Value| {
        let scaling =
            json!({"type": "longrope", "short_factor": short, "long_factor": vec![1.0; 8]});
        json!({"rope_scaling": scaling})
    };
    let refused = |short, parts: &[&str]| assert_refused("phi3", &rope(short), parts);
    let key = "rope_scaling.short_factor";
    refused(json!(vec![1.0; 7]), &[key, "has 7", "expected 8 numbers"]);
    refused(json!(null), &[key, "expected 8 numbers"]);
    refused(json!(["1"]), &[key, "[\"1\"]", "expected 8 numbers"]);
    refused(json!(vec![0.0; 8]), &[key, "above 0"]);
    decoder("phi3", &rope(json!(vec![1.0; 8])));
}

#[test]
fn heads_rotate_by_a_share_of_at_most_one() {
    let keys = json!({"partial_rotary_factor": 1.5});
    assert_refused(
        "phi3",
        &keys,
        &["partial_rotary_factor", "1.5", "at most 1"],
    );
    let half = json!({"rope_parameters": {"partial_rotary_factor": 0.5}});
    assert_eq!(decoder("phi3", &half).ropes[0].rotary_dim, 8);
}

#[test]
fn flags_for_what_is_not_computed_are_refused() {
    for (model_type, key) in [
        ("gemma", "use_bidirectional_attention"),
        ("gemma3_text", "use_bidirectional_attention"),
        ("gpt2", "add_cross_attention"),
    ] {
        let parts = [key, "true", "expected false"];
        assert_refused(model_type, &json!({key: true}), &parts);
        decoder(model_type, &json!({key: false}));
    }
}

#[test]
fn attention_to_what_follows_is_refused() {
    for model_type in ["llama", "mistral", "gpt2"] {
        let parts = ["is_causal", "false", "expected true"];
        assert_refused(model_type, &json!({"is_causal": false}), &parts);
        decoder(model_type, &json!({"is_causal": true}));
    }
}

#[test]
fn windows_of_mistral_are_those_of_its_layer_types() {
    let of = |types: &[&str]| {
        let keys = json!({"num_hidden_layers": 2, "sliding_window": 5, "layer_types": types});
        decoder("mistral", &keys).sliding_windows
    };
    assert_eq!(
        of(&["full_attention", "sliding_attention"]),
        [None, Some(5)]
    );
    let keys = json!({"num_hidden_layers": 2, "sliding_window": 5});
    assert_eq!(decoder("mistral", &keys).sliding_windows, [Some(5); 2]);
}

#[test]
fn bounds_and_factors_are_above_zero() {
    let keys = json!({"attn_logit_softcapping": -1});
    assert_refused(
        "gemma2",
        &keys,
        &["attn_logit_softcapping", "-1", "above 0"],
    );
    let keys = json!({"query_pre_attn_scalar": 0});
    assert_refused("gemma3_text", &keys, &["query_pre_attn_scalar", "above 0"]);
    for key in [
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
    ] {
        for value in [json!(0), json!(-0.5)] {
            let parts = [key, &value.to_string(), "expected a number above 0"];
            assert_refused("granite", &json!({key: value}), &parts);
        }
        for value in [1e-50, 1e50] {
            let parts = [key, &json!(value).to_string(), "32 bits"];
            assert_refused("granite", &json!({key: value}), &parts);
        }
    }
}

#[test]
fn a_head_is_tied_or_not_and_null_is_neither() {
    for model_type in ["gemma", "gpt2", "llama", "smollm3"] {
        let parts = ["tie_word_embeddings", "null", "expected true or false"];
        assert_refused(model_type, &json!({"tie_word_embeddings": null}), &parts);
    }
}

#[test]
fn activations_are_named_by_their_own_key() {
    for (model_type, key) in [
        ("gemma", "hidden_act"),
        ("gemma2", "hidden_activation"),
        ("gpt2", "activation_function"),
    ] {
        let parts = [key, "`gelu_neww`", "did you mean `gelu_new`"];
        assert_refused(model_type, &json!({key: "gelu_neww"}), &parts);
    }
}

#[test]
fn what_a_config_leaves_out_is_what_its_class_has() {
    let gemma2 = decoder("gemma2", &json!({}));
    assert_eq!(gemma2.attention_softcap, Some(50.0));
    assert_eq!(gemma2.sliding_windows, [Some(4096), None, Some(4096), None]);
    let none = json!({"final_logit_softcapping": null, "sliding_window": null});
    let gemma2 = decoder("gemma2", &none);
    assert_eq!(gemma2.logits_softcap, None);
    assert_eq!(gemma2.sliding_windows, [None; 4]);
    let gemma3 = decoder("gemma3_text", &json!({"sliding_window_pattern": 2}));
    assert_eq!(gemma3.layer_ropes, [Some(1), Some(0), Some(1), Some(0)]);
    assert_eq!([gemma3.ropes[0].theta, gemma3.ropes[1].theta], [1e6, 1e4]);
    // Of Gemma 3, parameters that are of no kind of layer are nobody's; an older scaling is full attention's.
    let linear = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0});
    let thetas = |keys: Value| decoder("gemma3_text", &keys).ropes.into_iter();
    let thetas = |keys: Value| thetas(keys).map(|rope| rope.theta).collect::<Vec<_>>();
    assert_eq!(thetas(json!({"rope_parameters": linear})), [1e6, 1e4]);
    assert_eq!(thetas(json!({"rope_scaling": linear})), [5.0, 1e4]);
    let both = json!({"rope_scaling": linear, "rope_parameters": {"sliding_attention": {"rope_theta": 7.0}}});
    assert_eq!(thetas(both), [5.0, 7.0]);
    let gpt2 = decoder(
        "gpt2",
        &json!({"n_embd": 32, "n_head": 4, "head_dim": null}),
    );
    // Transformers knows no other name of `n_inner`.
    assert_eq!([gpt2.head_dim, gpt2.intermediate_size], [8, 128]);
    let other_names =
        json!({"hidden_size": 48, "num_attention_heads": 6, "head_dim": null, "n_inner": null});
    let gpt2 = decoder("gpt2", &other_names);
    assert_eq!([gpt2.hidden_size, gpt2.heads, gpt2.layers], [48, 6, 4]);
    assert_eq!([gpt2.head_dim, gpt2.intermediate_size], [8, 192]);
    assert!(gpt2.tie_word_embeddings && gpt2.ropes.is_empty());
}

/// Of a config.json that says `model_type` and nothing else.
#[test]
fn whatever_is_left_out_is_what_transformers_class_has() {
    let classes: Value = serde_json::from_str(CLASSES).expect("JSON");
    let classes = classes.as_object().expect("an object");
    assert_eq!(classes.len(), super::ARCHITECTURES.len());
    for (name, class) in classes {
        let alone = json!({"model_type": name});
        let config = HfConfig::from_value(Path::new("config.json"), alone).expect("an object");
        let ours = DecoderConfig::from_hf(&config).expect("a class is whole");
        let size = |key: &str| class[key].as_u64().map(|n| n as usize);
        let (hidden, heads) = (ours.hidden_size, ours.heads);
        for (key, value, absent) in [
            ("hidden_size", hidden, 0),
            ("intermediate_size", ours.intermediate_size, 4 * hidden),
            ("num_hidden_layers", ours.layers, 0),
            ("num_attention_heads", heads, 0),
            ("num_key_value_heads", ours.kv_heads, heads),
            ("head_dim", ours.head_dim, hidden / heads),
            ("vocab_size", ours.vocab_size, 0),
            ("max_position_embeddings", ours.max_position_embeddings, 0),
        ] {
            assert_eq!(value, size(key).unwrap_or(absent), "{name} {key}");
        }
        let number = |key: &str| class[key].as_f64();
        let same = |key: &str, ours: f32, theirs: f64| {
            let error = (f64::from(ours) / theirs - 1.0).abs();
            assert!(error < 1e-6, "{name} {key}: {ours} {theirs}");
        };
        let eps = number("rms_norm_eps").or(number("layer_norm_epsilon"));
        same("eps", ours.norm_eps, eps.expect("every class has one"));
        let root = (ours.head_dim as f64).sqrt().recip();
        let scalar = number("query_pre_attn_scalar").map(|n| n.sqrt().recip());
        let scale = scalar.or(number("attention_multiplier")).unwrap_or(root);
        for ours in ours.attention_scales {
            same("attention_scale", ours, scale);
        }
        let residual = number("residual_multiplier").unwrap_or(1.0);
        same("residual_scale", ours.residual_scale, residual);
        let logits = number("logits_scaling").map_or(1.0, f64::recip);
        same("logits_scale", ours.logits_scale, logits);
        let softcap = |key: &str| number(key).map(|cap| cap as f32);
        // Gemma 3 computes nothing with that of scores.
        assert_eq!(
            ours.attention_softcap,
            softcap("attn_logit_softcapping"),
            "{name}"
        );
        assert_eq!(
            ours.logits_softcap,
            softcap("final_logit_softcapping"),
            "{name}"
        );
        let tied = class["tie_word_embeddings"].as_bool();
        assert_eq!(Some(ours.tie_word_embeddings), tied, "{name}");
        let keys = ["hidden_act", "hidden_activation", "activation_function"];
        let activation = match keys.iter().find_map(|key| class[*key].as_str()) {
            Some("silu") => Activation::Silu,
            Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(ours.activation, activation, "{name}");
        let flag = |key: &str| class[key].as_bool();
        // Qwen 2 and GPT-2 have biases without a key for them.
        let of_qkv = flag("attention_bias").unwrap_or(["qwen2", "gpt2"].contains(&name.as_str()));
        assert_eq!(ours.qkv_bias, of_qkv, "{name}");
        let of_mlp = flag("mlp_bias").unwrap_or(name == "gpt2");
        assert_eq!(ours.mlp_bias, of_mlp, "{name}");
        for layer in 0..ours.layers {
            let kind = class["layer_types"][layer].as_str();
            let slides = kind.is_none_or(|kind| kind == "sliding_attention");
            let window = size("sliding_window").filter(|_| slides);
            assert_eq!(ours.sliding_windows[layer], window, "{name} {layer}");
            let rotates = name != "gpt2" && class["no_rope_layers"][layer] != json!(0);
            let rope = ours.layer_ropes[layer].map(|rope| ours.ropes[rope].theta);
            let theta = class["rope_parameters"]["rope_theta"].as_f64();
            let of_kind = || class["rope_parameters"][kind?]["rope_theta"].as_f64();
            assert_eq!(
                rope,
                theta.or_else(of_kind).filter(|_| rotates),
                "{name} {layer}"
            );
        }
    }
}

#[test]
fn gpt2_may_scale_scores_by_the_number_of_the_layer() {
    let keys = json!({"scale_attn_by_inverse_layer_idx": true});
    let scales = decoder("gpt2", &keys).attention_scales;
    assert_eq!(scales, [0.25, 0.125, 0.25 / 3.0, 0.0625]);
}

#[test]
fn older_names_of_longrope_are_known() {
    let keys = json!({
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "su", "short_factor": vec![1.0; 8], "long_factor": vec![2.0; 8]},
    });
    let rope = &decoder("phi3", &keys).ropes[0];
    let RopeScaling::LongRope {
        original_max_position,
        ..
    } = rope.scaling
    else {
        panic!("{rope:?} is no longrope");
    };
    assert_eq!(original_max_position, 32.0);
    assert_eq!([rope.variant(32), rope.variant(33)], [0, 1]);
    let [short, long] = [32, 33].map(|length| rope.inverse_frequencies(length));
    assert!(short.iter().zip(&long).all(|(s, l)| *s == 2.0 * l));
    // sqrt(1 + ln 4 / ln 32)
    assert!((rope.attention_factor() - 1.4_f64.sqrt()).abs() < 1e-12);
}

#[test]
fn every_architecture_is_found_by_its_name() {
    for (name, _) in super::ARCHITECTURES {
        let config = config(name, &json!({}));
        assert!(super::is_known(&config));
        assert_eq!(architecture(&config).expect("valid").model_type, *name);
    }
}
