//! The half of `tests/peft_roundtrip.sh` that needs no Python: adapters trained here, with the
//! logits that this engine gets from the files it wrote.

mod common;

use common::{Shape, Workbench, chat_rows, copy_dir, ferrotune, text, write_rows};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Where to keep the results for the script; a temporary directory otherwise.
const KEEP: &str = "FERROTUNE_ROUNDTRIP_DIR";

fn variants() -> Vec<(&'static str, Shape, Value)> {
    let plain = Shape::default();
    let biased = Shape {
        bias: true,
        tied: true,
        ..plain.clone()
    };
    let every = json!({"lora_target_modules": "all-linear", "lora_dropout": 0.1});
    let rslora = json!({"lora_target_modules": "all-linear", "use_rslora": true, "lora_r": 6});
    let patterns = json!({
        "lora_target_modules": ["q_proj", "up_proj"],
        "lora_rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "lora_alpha_pattern": {"up_proj": 3},
    });
    let dora = json!({"lora_target_modules": ["q_proj", "down_proj"], "use_dora": true});
    let dora_table = json!({"lora_target_modules": ["q_proj", "embed_tokens"], "use_dora": true});
    let dora_head = json!({"lora_target_modules": ["q_proj", "lm_head"], "use_dora": true});
    let own = |init: &str| json!({"init_lora_weights": init, "lora_convert_init": false});
    let data = |init: &str| json!({"init_lora_weights": init, "lora_init_batches": 4});
    let switched = json!({
        "init_lora_weights": "olora", "lora_r": 3, "lora_alpha": 4, "use_rslora": true, "use_dora": true,
        "lora_rank_pattern": {"v_proj": 2}, "lora_alpha_pattern": {"down_proj": 5},
        "lora_modules_to_save": ["norm"],
    });
    let replicated = json!({
        "lora_target_modules": ["q_proj", "down_proj"],
        "lora_layer_replication": [[0, 2], [0, 1], [1, 2]],
        "lora_modules_to_save": ["layers.2.mlp"],
    });
    let head_bias = json!({"lora_target_modules": ["q_proj", "lm_head"], "lora_b_bias": true});
    let tied_update = json!({
        "lora_target_modules": ["q_proj", "embed_tokens"],
        "lora_ensure_weight_tying": true,
    });
    let tied_saved = json!({
        "lora_target_modules": ["q_proj"],
        "lora_modules_to_save": ["embed_tokens"],
        "lora_ensure_weight_tying": true,
    });
    let mut variants = vec![
        (
            "pissa",
            plain.clone(),
            json!({"init_lora_weights": "pissa"}),
        ),
        ("pissa_own", biased.clone(), own("pissa")),
        (
            "pissa_niter",
            plain.clone(),
            json!({"init_lora_weights": "pissa_niter_4"}),
        ),
        (
            "olora",
            biased.clone(),
            json!({"init_lora_weights": "olora"}),
        ),
        ("olora_own", plain.clone(), own("olora")),
        ("eva", biased.clone(), data("eva")),
        ("corda", plain.clone(), data("corda")),
        ("lora_ga", biased.clone(), data("lora_ga")),
        ("olora_switched", plain.clone(), switched),
        ("q_v_down", plain.clone(), json!({})),
        ("all_linear", biased.clone(), every),
        ("rslora", plain.clone(), rslora),
        ("patterns", plain, patterns),
        ("dora", biased.clone(), dora),
        ("dora_table", biased.clone(), dora_table),
        ("dora_head", biased.clone(), dora_head),
        ("layer_replication", biased.clone(), replicated),
        ("head_bias", biased.clone(), head_bias),
        ("tied_update", biased.clone(), tied_update),
        ("tied_saved", biased.clone(), tied_saved),
        (
            "alora",
            biased.clone(),
            json!({"lora_target_modules": "all-linear", "alora_invocation_tokens": [3]}),
        ),
    ];
    let classes = json!({"lora_task_type": "SEQ_CLS", "num_labels": 3, "lora_modules_to_save": ["model.norm"]});
    variants.push(("classifier", biased.clone(), classes));
    variants.extend(of_peft_config(&biased));
    let classes =
        json!({"lora_task_type": "SEQ_CLS", "num_labels": 3, "peft_config": {"peft_type": "IA3"}});
    variants.push(("ia3_classifier", biased, classes));
    variants
}

/// What `peft_config` asks for, on `base`.
fn of_peft_config(base: &Shape) -> Vec<(&'static str, Shape, Value)> {
    let mut variants = vec![
        (
            "ln_tuning",
            base.clone(),
            json!({"peft_config": {"peft_type": "LN_TUNING"}, "learning_rate": 5e-2}),
        ),
        (
            "ln_tuning_saved",
            base.clone(),
            json!({"peft_config": {"peft_type": "LN_TUNING", "modules_to_save": ["embed_tokens", "model.norm"]},
                   "learning_rate": 5e-2}),
        ),
        (
            "trainable_tokens",
            base.clone(),
            json!({"peft_config": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [2, 3, 10, 11, 12]},
                   "learning_rate": 1.0}),
        ),
    ];
    for (name, keys) in methods() {
        let prompts = ["P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"].map(Value::from);
        let mut method = match prompts.contains(&keys["peft_type"]) {
            true => json!({}),
            false => json!({"target_modules": ["q_proj", "v_proj", "down_proj"]}),
        };
        let keys = keys.as_object().expect("an object").clone();
        method.as_object_mut().expect("an object").extend(keys);
        let changes = json!({"peft_config": method, "learning_rate": 2e-2});
        variants.push((name, base.clone(), changes));
    }
    for (name, keys) in methods_on_the_head() {
        let mut method = json!({"target_modules": ["q_proj", "lm_head"]});
        let keys = keys.as_object().expect("an object").clone();
        method.as_object_mut().expect("an object").extend(keys);
        let changes = json!({"peft_config": method, "learning_rate": 2e-2});
        variants.push((name, base.clone(), changes));
    }
    for (name, keys) in beside_methods() {
        let mut method = json!({"target_modules": ["q_proj", "v_proj", "down_proj"]});
        let keys = keys.as_object().expect("an object").clone();
        method.as_object_mut().expect("an object").extend(keys);
        let changes = json!({"peft_config": method, "learning_rate": 2e-2});
        for tied in [false, true] {
            let shape = Shape {
                tied,
                ..base.clone()
            };
            let name = format!("{name}{}", if tied { "_tied" } else { "" });
            variants.push((name.leak(), shape, changes.clone()));
        }
    }
    variants
}

/// A method of each kind, which PEFT saves with the base's tables where the head is a target.
fn methods_on_the_head() -> Vec<(&'static str, Value)> {
    vec![
        (
            "adalora_head",
            json!({"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 5}),
        ),
        ("ia3_head", json!({"peft_type": "IA3"})),
        ("loha_head", json!({"peft_type": "LOHA", "r": 4})),
        ("oft_head", json!({"peft_type": "OFT", "oft_block_size": 8})),
        (
            "vera_head",
            json!({"peft_type": "VERA", "r": 8, "modules_to_save": ["embed_tokens"]}),
        ),
    ]
}

/// Methods beside LoRA, with parts of the base that are trained beside them.
fn beside_methods() -> Vec<(&'static str, Value)> {
    vec![
        (
            "adalora_saved",
            json!({"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 5,
                   "modules_to_save": ["embed_tokens"], "ensure_weight_tying": true, "bias": "lora_only"}),
        ),
        (
            "boft_bias",
            json!({"peft_type": "BOFT", "boft_block_size": 4, "bias": "all", "modules_to_save": ["lm_head"]}),
        ),
        (
            "ia3_saved",
            json!({"peft_type": "IA3", "modules_to_save": ["lm_head", "norm", "1.mlp"]}),
        ),
        (
            "lokr_saved",
            json!({"peft_type": "LOKR", "r": 2, "modules_to_save": ["embed_tokens", "o_proj"]}),
        ),
        (
            "miss_bias",
            json!({"peft_type": "MISS", "r": 8, "bias": "MiSS_only"}),
        ),
        (
            "road_saved",
            json!({"peft_type": "ROAD", "group_size": 8, "modules_to_save": ["v_proj", "norm"]}),
        ),
        (
            "vblora_bias",
            json!({"peft_type": "VBLORA", "r": 2, "vector_length": 8, "num_vectors": 12, "bias": "all",
                   "modules_to_save": ["embed_tokens", "lm_head"]}),
        ),
        (
            "vera_saved",
            json!({"peft_type": "VERA", "r": 8, "bias": "vera_only", "modules_to_save": ["lm_head", "down_proj"]}),
        ),
    ]
}

/// Methods beside LoRA. On linears with biases, which some scale and others do not.
fn methods() -> Vec<(&'static str, Value)> {
    vec![
        ("boft", json!({"peft_type": "BOFT", "boft_block_size": 4})),
        ("c3a", json!({"peft_type": "C3A", "block_size": 8})),
        ("delora", json!({"peft_type": "DELORA", "r": 4})),
        (
            "fourierft",
            json!({"peft_type": "FOURIERFT", "n_frequency": 50}),
        ),
        ("hira", json!({"peft_type": "HIRA", "r": 4})),
        ("hra", json!({"peft_type": "HRA", "r": 4})),
        (
            "hra_gs",
            json!({"peft_type": "HRA", "r": 3, "apply_GS": true}),
        ),
        ("ia3", json!({"peft_type": "IA3"})),
        ("loha", json!({"peft_type": "LOHA", "r": 4})),
        ("lokr", json!({"peft_type": "LOKR", "r": 2})),
        ("miss", json!({"peft_type": "MISS", "r": 8})),
        (
            "miss_bat",
            json!({"peft_type": "MISS", "r": 8, "init_weights": "bat"}),
        ),
        ("oft", json!({"peft_type": "OFT", "oft_block_size": 8})),
        (
            "adalora",
            json!({"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 5}),
        ),
        (
            "prompt_tuning",
            json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "prompt_tuning_init": "SAMPLE_VOCAB"}),
        ),
        (
            "p_tuning_lstm",
            json!({
                "peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 12,
                "encoder_reparameterization_type": "LSTM",
            }),
        ),
        (
            "p_tuning_mlp",
            json!({"peft_type": "P_TUNING", "num_virtual_tokens": 4}),
        ),
        (
            "prefix_tuning",
            json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}),
        ),
        (
            "prefix_tuning_projection",
            json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "prefix_projection": true}),
        ),
        ("randlora", json!({"peft_type": "RANDLORA", "r": 8})),
        (
            "randlora_drawn",
            json!({"peft_type": "RANDLORA", "r": 5, "save_projection": false, "projection_prng_key": 5}),
        ),
        (
            "randlora_drawn_very_sparse",
            json!({"peft_type": "RANDLORA", "r": 8, "very_sparse": true, "randlora_alpha": 64, "save_projection": false}),
        ),
        (
            "road",
            json!({"peft_type": "ROAD", "group_size": 8, "variant": "road_4"}),
        ),
        (
            "vblora",
            json!({"peft_type": "VBLORA", "r": 2, "vector_length": 8, "num_vectors": 12}),
        ),
        ("vera", json!({"peft_type": "VERA", "r": 8})),
        (
            "vera_drawn",
            json!({"peft_type": "VERA", "r": 8, "save_projection": false, "projection_prng_key": 5}),
        ),
    ]
}

#[test]
fn adapters_are_written_with_their_logits() {
    for (name, shape, changes) in variants() {
        let bench = Workbench::of(&shape, 16);
        let mut all = json!({"max_steps": 20, "lr_scheduler_type": "constant"});
        let changes = changes.as_object().expect("an object").clone();
        all.as_object_mut().expect("an object").extend(changes);
        let mut rows = chat_rows(16);
        for (i, row) in rows.iter_mut().enumerate() {
            row["label"] = json!(i % 3);
        }
        write_rows(&bench.path("rows.jsonl"), &rows);
        bench.train("adapter", &all).expect(0);
        let (base, adapter) = (bench.path("base"), bench.path("adapter"));
        let logits = |file: &PathBuf, adapter: Option<&PathBuf>| {
            let mut arguments = vec!["eval", "--limit", "1", "--model-name-or-path", text(&base)];
            let rows = bench.path("rows.jsonl");
            arguments.extend(["--data", text(&rows), "--logits-file", text(file)]);
            if let Some(adapter) = adapter {
                arguments.extend(["--adapter", text(adapter)]);
            }
            ferrotune(&arguments).expect(0);
            tensors_f32(file)
        };
        let with = logits(&bench.path("logits.safetensors"), Some(&adapter));
        let without = logits(&bench.path("base_logits.safetensors"), None);
        let moved = with
            .iter()
            .zip(&without)
            .fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
        // A new head gives other logits than the base's.
        let has_new_head = all.get("num_labels").is_some();
        assert!(
            moved > 0.1 && has_new_head == (with.len() != without.len()),
            "{name}: the adapter moves logits by {moved} only"
        );
        if let Some(keep) = std::env::var_os(KEEP) {
            let to = PathBuf::from(keep).join(name);
            copy_dir(&base, &to.join("base"));
            copy_dir(&adapter, &to.join("adapter"));
            std::fs::copy(
                bench.path("logits.safetensors"),
                to.join("logits.safetensors"),
            )
            .expect("writable");
        }
    }
}

fn tensors_f32(file: &PathBuf) -> Vec<f32> {
    let read = ferrotune::core::io::SafetensorsFile::open(file).expect("safetensors");
    read.read_f32("logits").expect("logits")
}
