//! `inspect model`, `adapter` and `diff` as a person and a program read them.

mod common;

use common::{Workbench, ferrotune, text};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn golden(path: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/adapters");
    root.join(path)
}

fn json(arguments: &[&str]) -> Value {
    let finished = ferrotune(&[&["inspect"], arguments, &["--json"]].concat()).expect(0);
    serde_json::from_str(&finished.stdout).expect("JSON")
}

#[test]
fn a_model_shows_its_modules_and_what_would_be_adapted() {
    let base = golden("_bases/llama_tied");
    let whole = json(&["model", text(&base)]);
    assert_eq!(
        (&whole["parameters"], &whole["dtypes"]["F32"]),
        (&26784.into(), &20.into())
    );
    let modules = whole["modules"].as_array().expect("a list");
    assert_eq!(modules.len(), 21);
    assert_eq!(modules[20]["tied_to"], "model.embed_tokens");
    let choices = whole["choices"].as_array().expect("a list");
    assert_eq!(choices[0]["target_modules"], "q_proj, v_proj");
    assert_eq!(choices[1]["modules"].as_array().map(Vec::len), Some(14));

    let asked = [
        "model",
        text(&base),
        "--rank",
        "2",
        "--target-modules",
        "q_proj,embed_tokens",
    ];
    let choice = &json(&asked)["choices"][0];
    // 2 (32 + 32) in two layers, and 2 (256 + 32).
    assert_eq!(choice["trained_values"], 2 * 128 + 576);
    let shown = ferrotune(&["inspect", "model", text(&base)])
        .expect(0)
        .stdout;
    assert!(
        shown.contains("2 x  model.layers.N.mlp.down_proj"),
        "{shown}"
    );
    let wrong = ["inspect", "model", text(&base), "--target-modules", "q_prj"];
    let wrong = ferrotune(&wrong).expect(78).stderr;
    assert!(wrong.contains("did you mean `q_proj`"), "{wrong}");
}

#[test]
fn targets_are_read_as_a_configuration_reads_them() {
    let base = golden("_bases/llama_tied");
    for (words, modules) in [
        (&[r"model.layers.\d{1,2}.self_attn.q_proj"][..], 2),
        (&["model.layers.[01].self_attn.[qv]_proj"], 4),
        (&["(model.)?layers.0.mlp.up_proj"], 1),
        (&["All-Linear"], 14),
        (&["q_proj, v_proj"], 4),
        (&["q_proj", "v_proj,o_proj"], 6),
        (&["[q_proj, v_proj]"], 4),
        (&["model.layers.0.self_attn.q_proj"], 1),
    ] {
        let asked = [&["model", text(&base), "--target-modules"], words].concat();
        let found = json(&asked)["choices"][0]["modules"].clone();
        assert_eq!(found.as_array().map(Vec::len), Some(modules), "{words:?}");
    }
    let mixed = [
        "inspect",
        "model",
        text(&base),
        "--target-modules",
        "q_proj,.*v_proj",
    ];
    let mixed = ferrotune(&mixed).expect(78).stderr;
    assert!(mixed.contains("as one string instead of a list"), "{mixed}");
}

#[test]
fn an_adapter_shows_its_updates_and_a_difference_its_modules() {
    let [qv, tokens] = ["lora_qv", "lora_trainable_tokens"].map(|c| golden(c).join("adapter"));
    let facts = json(&["adapter", text(&tokens)]);
    assert_eq!(facts["updates"].as_array().map(Vec::len), Some(4));
    assert_eq!(facts["tensors"][0]["shape"], serde_json::json!([3, 32]));
    let shown = ferrotune(&["inspect", "adapter", text(&tokens)])
        .expect(0)
        .stdout;
    assert!(
        shown.starts_with("LORA of adapters/_bases/llama: 4 updates, 1 other"),
        "{shown}"
    );

    // What a method changes of the base is seen with the base, and is what merging reports.
    let [dora, loha] = ["dora", "loha"].map(|c| golden(c).join("adapter"));
    let base = golden("_bases/llama");
    let facts = json(&["adapter", text(&dora)]);
    let range = &facts["updates"][0]["magnitudes"];
    let [low, high] = [0, 1].map(|i| range[i].as_f64().expect("a norm"));
    assert!(0.0 < low && low < high, "{range}");
    assert!(facts["changes"].is_null());
    let shown = ferrotune(&["inspect", "adapter", text(&dora)])
        .expect(0)
        .stdout;
    assert!(shown.contains("row norms"), "{shown}");
    let facts = json(&["adapter", text(&loha), "--base", text(&base)]);
    let changes = facts["changes"].as_array().expect("with a base");
    let directory = tempfile::tempdir().expect("temporary directory");
    let merged = directory.path().join("merged");
    let options = ferrotune::lora::MergeOptions::default();
    let report = ferrotune::lora::merge(&base, &loha, &merged, &options).expect("merges");
    assert_eq!(changes.len(), report.tensors.len());
    for (change, tensor) in changes.iter().zip(&report.tensors) {
        assert_eq!(change["name"], tensor.name);
        assert_eq!(change["norm"], tensor.delta_norm);
        assert!(tensor.delta_norm > 0.0 && tensor.base_norm > 0.0);
    }
    let shown = ferrotune(&["inspect", "adapter", text(&loha), "--base", text(&base)]);
    let shown = shown.expect(0).stdout;
    assert!(
        shown.contains("of its norm") && shown.contains("LOHA"),
        "{shown}"
    );

    let found = json(&["diff", text(&qv), text(&tokens)]);
    assert_eq!(found["config"][0]["key"], "trainable_token_indices");
    assert_eq!(found["only_second"].as_array().map(Vec::len), Some(1));
    let same = ferrotune(&["inspect", "diff", text(&qv), text(&qv)])
        .expect(0)
        .stdout;
    assert!(same.contains("0 keys differ, 0 modules"), "{same}");
    let none = ferrotune(&["inspect", "adapter", text(&golden("_bases"))]).expect(65);
    assert!(
        none.stderr.contains("is no PEFT adapter"),
        "{}",
        none.stderr
    );
}

#[test]
fn a_plan_has_a_table_of_the_modules_that_are_matched() {
    let bench = Workbench::new(8);
    let plan = |name: &str, changes: &Value| -> Value {
        let config = bench.config(name, changes);
        // Switches may stand before the file.
        let finished = ferrotune(&["train", "--dry-run", "--json", text(&config)]).expect(0);
        serde_json::from_str(&finished.stdout).expect("JSON")
    };
    let table = |plan: &Value| -> Vec<(String, u64, String, u64)> {
        let rows = plan["modules"].as_array().expect("a table").iter();
        rows.map(|row| {
            let name = row["name"].as_str().unwrap_or("all").to_owned();
            let attached = row["attached"].as_str().expect("words").to_owned();
            let number = |key: &str| row[key].as_u64().expect("a number");
            (
                name,
                number("count"),
                attached,
                number("trainable_parameters"),
            )
        })
        .collect()
    };
    let row = |name: &str, count, attached: &str, trainable| {
        (
            format!("model.{name}"),
            count,
            attached.to_owned(),
            trainable,
        )
    };
    let lora = plan("lora", &json!({"lora_modules_to_save": ["embed_tokens"]}));
    let embedding = lora["trainable_parameters"].as_u64().expect("a number") - 4 * 2 * 192;
    let expected = [
        row("embed_tokens", 1, "trained whole", embedding),
        row("layers.N.self_attn.q_proj", 2, "rank 4", 4 * 2 * 64),
        row("layers.N.self_attn.v_proj", 2, "rank 4", 4 * 2 * 48),
        row("layers.N.mlp.down_proj", 2, "rank 4", 4 * 2 * 80),
    ];
    assert_eq!(table(&lora), expected);
    for changes in [
        json!({"use_peft": false}),
        json!({"peft_config": {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]}}),
        json!({"peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}}),
    ] {
        let plan = plan("other", &changes);
        let rows = table(&plan);
        let sum: u64 = rows.iter().map(|row| row.3).sum();
        assert_eq!(plan["trainable_parameters"], sum, "{changes}: {rows:?}");
    }
}

#[test]
fn a_plan_has_the_least_time_of_the_products_that_no_run_leaves_out() {
    let bench = Workbench::new(8);
    // Of a layer q and o, k and v, gate, up and down; of the head 96 x 32.
    let layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32;
    let targets = |targets: Value| json!({"lora_target_modules": targets, "num_train_epochs": 3});
    for (changes, passes) in [
        // Forward in both layers, and backward in the one above the first that is adapted.
        (targets(json!(["q_proj"])), [2, 1, 0]),
        (targets(json!("model.layers.1.self_attn.q_proj")), [2, 0, 0]),
        (targets(json!(["lm_head"])), [2, 0, 0]),
        (targets(json!(["embed_tokens"])), [2, 2, 0]),
        (json!({"use_peft": false, "num_train_epochs": 3}), [2, 2, 2]),
        (
            json!({"lora_target_modules": ["q_proj"], "load_in_8bit": true, "num_train_epochs": 3}),
            [0, 1, 0],
        ),
    ] {
        let config = bench.config("plan", &changes);
        let finished = ferrotune(&["plan", text(&config)]).expect(0);
        let plan: Value = serde_json::from_str(&finished.stdout).expect("JSON");
        let number = |value: &Value| value.as_f64().expect("a number");
        let [tokens, trained] = ["tokens", "trained_tokens"].map(|key| number(&plan[key]));
        let layers = passes.iter().sum::<i32>() * layer;
        let epoch = 2.0 * f64::from(layers) * tokens + 4.0 * f64::from(96 * 32) * trained;
        let [steps, per_epoch] = ["total_steps", "steps_per_epoch"].map(|key| number(&plan[key]));
        let least = &plan["least_time"];
        let flops = number(&least["flops"]);
        let expected = epoch * steps / per_epoch;
        assert!((flops / expected - 1.0).abs() < 1e-12, "{changes}: {flops}");
        let (seconds, rate) = (
            number(&least["seconds"]),
            number(&least["flops_per_second"]),
        );
        assert!(rate > 0.0 && seconds == flops / rate, "{least}");
        let product = least["product"].as_str().expect("words");
        assert!(product.ends_with(" x 48 x 32 in f32"), "{product}");
    }
}

#[test]
fn packing_keeps_the_start_of_a_row_whichever_end_is_asked_for() {
    let bench = Workbench::new(4);
    std::fs::write(bench.path("rows.jsonl"), r#"{"text": "abcdefghij"}"#).expect("writable");
    for (packing, seen) in [(true, "abcd"), (false, "hij<|im_end|>")] {
        let changes = json!({"max_length": 4, "truncation_mode": "keep_end", "packing": packing});
        let config = bench.config("inspect", &changes);
        let finished = ferrotune(&["inspect", "data", text(&config), "--json"]).expect(0);
        let shown: Value = serde_json::from_str(&finished.stdout).expect("JSON");
        let segments = shown["shown"][0]["segments"]
            .as_array()
            .expect("a list")
            .iter();
        let row: String = segments.filter_map(|part| part["text"].as_str()).collect();
        assert_eq!(row, seen);
        assert_eq!(
            finished.stderr.contains("truncation_mode has no effect"),
            packing
        );
    }
}
