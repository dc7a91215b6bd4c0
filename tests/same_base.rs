//! An adapter and the weights it was trained on: what uses it on others is refused, noted where nobody can tell.

mod common;

use common::{
    Finished, Shape, Stored, Workbench, copy_dir, entries, ferrotune, read, read_json, text,
    write_model,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const RECORD: &str = "base_weights.json";
const BAD_INPUT: i32 = 65;
/// What 4 bits with scales in 8 are called.
const NESTED: &str = "nf4 of nested scales";

/// A bench with an adapter in `out` and its only checkpoint.
fn trained() -> Workbench {
    let bench = Workbench::new(8);
    let saved = json!({"save_strategy": "steps", "save_steps": 3});
    bench.train("out", &saved).expect(0);
    bench
}

/// Weights of the same shapes.
fn other(bench: &Workbench) -> PathBuf {
    let directory = bench.path("other");
    write_model(&directory, &Shape::default(), Stored::F32, 8);
    directory
}

/// `generate`, `eval` and `merge` of `adapter` on `base`, each with the path it writes, if any.
fn users(bench: &Workbench, base: &Path, adapter: &Path, more: &[&str]) -> Vec<Finished> {
    let (rows, merged) = (bench.path("rows.jsonl"), bench.path("merged"));
    let place = [
        "--model-name-or-path",
        text(base),
        "--adapter",
        text(adapter),
    ];
    let commands = [
        vec!["generate", "--prompt", "1+2=?", "--max-new-tokens", "1"],
        vec!["eval", "--data", text(&rows)],
        vec!["merge", "--overwrite", "--output-dir", text(&merged)],
    ];
    let run = |command: &Vec<&str>| ferrotune(&[command.as_slice(), &place, more].concat());
    commands.iter().map(run).collect()
}

fn record(directory: &Path) -> Value {
    read_json(&directory.join(RECORD))
}

#[test]
fn the_same_weights_elsewhere_are_the_same_base() {
    let bench = trained();
    let moved = bench.path("moved");
    copy_dir(&bench.path("base"), &moved);
    // What lies beside the weights is no part of them.
    let config = moved.join("config.json");
    let mut keys = read_json(&config);
    keys["_name_or_path"] = json!("somewhere");
    common::write_json(&config, &keys);
    let adapters = ["out", "out/checkpoint-3"].map(|name| bench.path(name));
    assert_eq!(record(&adapters[0]), record(&adapters[1]));
    for base in ["base", "moved"].map(|name| bench.path(name)) {
        for finished in users(&bench, &base, &adapters[0], &[]) {
            assert_eq!(finished.expect(0).stderr, "");
        }
    }
}

#[test]
fn other_weights_of_the_same_shapes_are_refused_unless_asked_for() {
    let bench = trained();
    let (base, other) = (bench.path("base"), other(&bench));
    for adapter in ["out", "out/checkpoint-3"].map(|name| bench.path(name)) {
        let digest = record(&adapter)["blake3"].as_str().expect("text")[..12].to_owned();
        for finished in users(&bench, &other, &adapter, &[]) {
            let said = finished.expect(BAD_INPUT).stderr;
            let parts = [
                text(&adapter),
                text(&base),
                text(&other),
                &digest,
                "F32 weights",
                "--any-base",
            ];
            for part in parts {
                assert!(said.contains(part), "{part}: {said}");
            }
        }
    }
    assert_eq!(entries(&bench.path("merged")), [""; 0]);
    for finished in users(&bench, &other, &bench.path("out"), &["--any-base"]) {
        let said = finished.expect(0).stderr;
        assert!(said.contains("note: --any-base: the adapter"), "{said}");
    }
    assert!(bench.path("merged").join("model.safetensors").exists());
}

#[test]
fn an_adapter_that_does_not_say_is_noted_by_the_name_of_its_base() {
    let bench = trained();
    let (base, adapter, other) = (bench.path("base"), bench.path("out"), other(&bench));
    std::fs::remove_file(adapter.join(RECORD)).expect("written");
    for (model, noted) in [(&base, false), (&other, true)] {
        for finished in users(&bench, model, &adapter, &[]) {
            let said = finished.expect(0).stderr;
            assert_eq!(
                said.contains("note: the adapter was trained on"),
                noted,
                "{said}"
            );
            assert_eq!(said.contains(text(&base)), noted, "{said}");
        }
    }
    std::fs::write(adapter.join(RECORD), "no JSON").expect("writable");
    for finished in users(&bench, &base, &adapter, &[]) {
        let said = finished.expect(BAD_INPUT).stderr;
        assert!(said.contains(RECORD), "{said}");
    }
}

/// bitsandbytes' nf4 of a model whose values are not here, with the tokenizer of the benches.
fn write_nf4(directory: &Path, shape: &Shape) {
    write_model(directory, shape, Stored::F32, 7);
    let case = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/golden/quant/hf_nf4_dq_fp32compute");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(case.join(file), directory.join(file)).expect("writable");
    }
}

#[test]
fn codes_and_values_may_be_of_one_model_and_are_noted() {
    let shape = Shape {
        vocab: 256,
        hidden: 64,
        intermediate: 128,
        head_dim: 16,
        ..Shape::default()
    };
    let bench = Workbench::of(&shape, 8);
    let [codes, halves] = ["codes", "halves"].map(|name| bench.path(name));
    write_nf4(&codes, &shape);
    write_model(&halves, &shape, Stored::Bf16, 7);
    bench.train("over_values", &json!({})).expect(0);
    bench
        .train("over_codes", &json!({"model_name_or_path": codes}))
        .expect(0);
    let [over_values, over_codes] = ["over_values", "over_codes"].map(|name| bench.path(name));
    assert_eq!(record(&over_codes)["format"], NESTED);
    for (base, adapter, formats) in [
        (&bench.path("base"), &over_codes, [NESTED, "F32"]),
        (&codes, &over_values, ["F32", NESTED]),
        (&halves, &over_values, ["F32", "BF16"]),
    ] {
        // Codes are not merged into.
        let commands = if base == &codes { 2 } else { 3 };
        for finished in users(&bench, base, adapter, &[]).into_iter().take(commands) {
            let said = finished.expect(0).stderr;
            let [trained, used] = formats.map(|format| format!("{format} weights "));
            assert!(said.contains("note: the adapter"), "{said}");
            let places = [said.find(&trained), said.find(&used)];
            assert!(places[0].is_some() && places[0] < places[1], "{said}");
        }
    }
}

#[test]
fn adapters_of_different_weights_are_not_combined_unless_asked_for() {
    let bench = trained();
    let other = other(&bench);
    bench.train("same", &json!({"seed": 5})).expect(0);
    bench
        .train("apart", &json!({"model_name_or_path": other}))
        .expect(0);
    let [first, same, apart, both] = ["out", "same", "apart", "both"].map(|name| bench.path(name));
    let combine = |second: &Path, more: &[&str]| {
        let adapters = [
            "combine",
            "--adapter",
            text(&first),
            "--adapter",
            text(second),
        ];
        ferrotune(&[&adapters[..], &["--output-dir", text(&both)], more].concat())
    };
    let said = combine(&apart, &[]).expect(BAD_INPUT).stderr;
    for part in [text(&first), text(&apart), "--any-base"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(entries(&both), [""; 0]);
    assert_eq!(combine(&same, &[]).expect(0).stderr, "");
    assert_eq!(read(&both.join(RECORD)), read(&first.join(RECORD)));
    // What is of two bases is of neither.
    let said = combine(&apart, &["--any-base", "--overwrite"])
        .expect(0)
        .stderr;
    assert!(said.contains("note: --any-base"), "{said}");
    assert!(!both.join(RECORD).exists());
}
