//! Classifiers of sequences: trained over language models and over classifiers, judged, merged, and what is wrong
//! with one.

mod common;

use common::{Finished, Workbench, copy_dir, ferrotune, read_json, text, write_json, write_rows};
use ferrotune::core::io::SafetensorsFile;
use serde_json::{Value, json};
use std::path::Path;

/// Rows of three classes, which the first letter tells apart.
fn rows(label: impl Fn(usize) -> Value) -> Vec<Value> {
    let row = |i: usize| {
        let (class, letter) = (i % 3, ["a", "m", "z"][i % 3]);
        json!({"text": format!("{letter}{}", "so ".repeat(1 + i % 4)), "label": label(class)})
    };
    (0..12).map(row).collect()
}

/// Long enough to know the rows by heart.
fn learning() -> Value {
    json!({"lora_task_type": "SEQ_CLS", "max_steps": 40, "learning_rate": 5e-3, "lr_scheduler_type": "constant"})
}

fn with(changes: &Value) -> Value {
    let mut keys = learning();
    let more = changes.as_object().expect("an object").clone();
    keys.as_object_mut().expect("an object").extend(more);
    keys
}

/// What `eval` finds of the rows with `base`, and an adapter on it.
fn eval(bench: &Workbench, base: &str, adapter: Option<&str>) -> Value {
    let (model, rows) = (bench.path(base), bench.path("rows.jsonl"));
    let adapter = adapter.map(|name| bench.path(name));
    let mut words = vec![
        "eval",
        "--data",
        text(&rows),
        "--model_name_or_path",
        text(&model),
    ];
    words.extend(
        adapter
            .iter()
            .flat_map(|adapter| ["--adapter", text(adapter)]),
    );
    let finished = ferrotune(&words).expect(0);
    serde_json::from_str(&finished.stdout).expect("JSON")
}

/// A classifier of three classes with the tokenizer of the tests.
fn classifier(bench: &Workbench) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/golden/adapters/_bases/llama_seqcls");
    let base = bench.path("classifier");
    copy_dir(&golden, &base);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(bench.path("base").join(file), base.join(file)).expect("writable");
    }
    let mut config = read_json(&base.join("config.json"));
    config["id2label"] = json!({"0": "bad", "1": "good", "2": "odd"});
    write_json(&base.join("config.json"), &config);
}

#[test]
fn a_language_model_gets_a_head_that_learns_and_is_saved_as_peft_saves_it() {
    let bench = Workbench::new(0);
    write_rows(&bench.path("rows.jsonl"), &rows(|class| json!(class)));
    bench
        .train("out", &with(&json!({"num_labels": 3})))
        .expect(0);
    let found = eval(&bench, "base", Some("out"));
    assert_eq!(found["eval_mean_token_accuracy"], 1.0, "{found}");
    assert_eq!(
        (&found["eval_num_tokens"], &found["eval_samples"]),
        (&json!(12), &json!(12))
    );
    assert!(
        found["eval_loss"].as_f64().expect("a number") < 0.1,
        "{found}"
    );

    let config = read_json(&bench.path("out/adapter_config.json"));
    assert_eq!(config["task_type"], "SEQ_CLS");
    assert_eq!(config["modules_to_save"], json!(["classifier", "score"]));
    let file = SafetensorsFile::open(bench.path("out/adapter_model.safetensors")).expect("written");
    let head = file
        .meta("base_model.model.score.weight")
        .expect("the head");
    assert_eq!(head.shape, [3, 32]);

    // The same bytes again, and the same result in other micro-batches.
    let bytes = |name: &str| std::fs::read(bench.path(name).join("adapter_model.safetensors"));
    bench
        .train("again", &with(&json!({"num_labels": 3})))
        .expect(0);
    assert_eq!(bytes("out").expect("read"), bytes("again").expect("read"));
    let split = json!({"num_labels": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2});
    bench.train("split", &with(&split)).expect(0);
    let difference = eval(&bench, "base", Some("split"))["eval_loss"]
        .as_f64()
        .expect("a number")
        - found["eval_loss"].as_f64().expect("a number");
    assert!(difference.abs() < 1e-4, "{difference}");
}

#[test]
fn other_methods_train_the_head_too() {
    let bench = Workbench::new(0);
    write_rows(&bench.path("rows.jsonl"), &rows(|class| json!(class)));
    for (name, keys) in [
        ("ia3", json!({"peft_type": "IA3"})),
        (
            "vera",
            json!({"peft_type": "VERA", "r": 8, "target_modules": ["q_proj", "v_proj"]}),
        ),
        ("norms", json!({"peft_type": "LN_TUNING"})),
    ] {
        let keys = with(&json!({"num_labels": 3, "peft_config": keys}));
        bench.train(name, &keys).expect(0);
        let found = eval(&bench, "base", Some(name));
        assert!(
            found["eval_loss"].as_f64().expect("a number") < 0.9,
            "{name}: {found}"
        );
    }
}

#[test]
fn a_classifier_keeps_its_head_and_its_names_and_merges() {
    let bench = Workbench::new(0);
    classifier(&bench);
    let named = |class: usize| json!(["bad", "good", "odd"][class]);
    write_rows(&bench.path("rows.jsonl"), &rows(named));
    let base = json!({"model_name_or_path": bench.path("classifier")});
    bench.train("out", &with(&base)).expect(0);
    let found = eval(&bench, "classifier", Some("out"));
    assert_eq!(found["eval_mean_token_accuracy"], 1.0, "{found}");

    let [base, adapter, merged] = ["classifier", "out", "merged"].map(|name| bench.path(name));
    let model = [
        "--model_name_or_path",
        text(&base),
        "--adapter",
        text(&adapter),
    ];
    ferrotune(&[&["merge", "--output_dir", text(&merged)][..], &model].concat()).expect(0);
    let after = eval(&bench, "merged", None);
    let loss = |found: &Value| found["eval_loss"].as_f64().expect("a number");
    assert!(
        (loss(&found) - loss(&after)).abs() < 1e-5,
        "{found} {after}"
    );
}

#[test]
fn long_rows_are_cut_and_keep_their_class() {
    let bench = Workbench::new(0);
    write_rows(&bench.path("rows.jsonl"), &rows(|class| json!(class)));
    for end in ["keep_start", "keep_end"] {
        let keys =
            json!({"num_labels": 3, "max_length": 4, "truncation_mode": end, "max_steps": 2});
        let told = bench.train(end, &with(&keys)).expect(0);
        assert!(!told.stderr.contains("no token"), "{}", told.stderr);
    }
}

/// Without a `pad_token_id` one token is read, and counts, as any last token.
#[test]
fn rows_of_one_token_are_of_a_class_too() {
    let bench = Workbench::new(0);
    let letter = |i: usize| ["a", "m", "z"][i % 3];
    let row = |i: usize| json!({"text": letter(i), "label": i % 3});
    write_rows(
        &bench.path("rows.jsonl"),
        &(0..12).map(row).collect::<Vec<_>>(),
    );
    bench
        .train("out", &with(&json!({"num_labels": 3})))
        .expect(0);
    let found = eval(&bench, "base", Some("out"));
    assert_eq!(found["eval_num_tokens"], 12, "{found}");
    assert_eq!(found["eval_mean_token_accuracy"], 1.0, "{found}");
    assert!(found.get("eval_perplexity").is_none(), "{found}");
}

#[test]
fn what_is_wrong_with_a_classifier_is_named() {
    let bench = Workbench::new(0);
    classifier(&bench);
    write_rows(&bench.path("rows.jsonl"), &rows(|class| json!(class)));
    let refused = |changes: Value, code: i32, parts: &[&str]| {
        let finished: Finished = bench.train("refused", &with(&changes)).expect(code);
        for part in parts {
            assert!(
                finished.stderr.contains(part),
                "{part}: {}",
                finished.stderr
            );
        }
        assert!(!bench.path("refused").exists(), "something was written");
    };
    refused(json!({}), 78, &["num_labels", "give the number of classes"]);
    refused(json!({"num_labels": 1}), 78, &["num_labels", "regression"]);
    refused(
        json!({"num_labels": 2}),
        65,
        &[
            "rows.jsonl:3",
            "`label` is 2",
            "expected a number from 0 to 1",
        ],
    );
    refused(
        json!({"num_labels": 3, "packing": true}),
        78,
        &["packing", "SEQ_CLS"],
    );
    refused(
        json!({"num_labels": 3, "use_peft": false}),
        78,
        &["use_peft", "new head"],
    );
    let classifier = bench.path("classifier");
    refused(
        json!({"num_labels": 5, "model_name_or_path": classifier}),
        78,
        &["num_labels", "a classifier of 3 classes"],
    );
    refused(
        json!({"lora_task_type": "CAUSAL_LM", "model_name_or_path": classifier}),
        78,
        &["lora_task_type", "set lora_task_type: SEQ_CLS"],
    );
    refused(
        json!({"num_labels": 3, "peft_config": {"peft_type": "IA3", "task_type": "TOKEN_CLS"}}),
        78,
        &["peft_config.task_type", "lora_task_type is SEQ_CLS"],
    );
    // A head that is trained over a language model is part of no checkpoint of one.
    bench
        .train("trained", &with(&json!({"num_labels": 3, "max_steps": 1})))
        .expect(0);
    let [base, adapter, merged] = ["base", "trained", "merged"].map(|name| bench.path(name));
    let model = [
        "--model_name_or_path",
        text(&base),
        "--adapter",
        text(&adapter),
    ];
    let finished = ferrotune(&[&["merge", "--output_dir", text(&merged)][..], &model].concat());
    let finished = finished.expect(65);
    assert!(
        finished
            .stderr
            .contains("needs a base that is a classifier"),
        "{}",
        finished.stderr
    );
    write_rows(&bench.path("rows.jsonl"), &[json!({"text": "a"})]);
    refused(
        json!({"num_labels": 3}),
        65,
        &["rows.jsonl:1", "`label` is missing"],
    );

    let asked = [
        "generate",
        "--max_new_tokens",
        "4",
        "--prompt",
        "a",
        "--model_name_or_path",
        text(&classifier),
    ];
    let finished = ferrotune(&asked).expect(78);
    assert!(
        finished.stderr.contains("is a classifier"),
        "{}",
        finished.stderr
    );
}
