//! Weights of the base and of the adapter.

use super::common::{
    Shape, Stored, Workbench, entries, ferrotune, read, read_json, text, write_json, write_model,
    write_weights,
};
use super::{BAD_INPUT, INTERNAL, check, fault};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn rewrite(bench: &Workbench, change: impl FnOnce(&mut Weights)) {
    let mut weights = Shape::default().weights(7);
    change(&mut weights);
    let path = bench.path("base/model.safetensors");
    write_weights(&path, weights.iter(), Stored::F32);
}

fn edit_bytes(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = read(path);
    change(&mut bytes);
    std::fs::write(path, bytes).expect("writable");
}

const UP: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn faults_of_the_tensors() {
    check(&[
        fault(
            "missing tensor",
            json!({}),
            |bench| rewrite(bench, |w| drop(w.remove(UP))),
            BAD_INPUT,
            &["model.safetensors", UP, "missing"],
        ),
        fault(
            "a head that is said to be the embedding and is not",
            json!({}),
            |bench| {
                let path = bench.path("base/config.json");
                let mut config = read_json(&path);
                config["tie_word_embeddings"] = json!(true);
                write_json(&path, &config);
            },
            BAD_INPUT,
            &[
                "model.safetensors",
                "`lm_head.weight`",
                "`model.embed_tokens.weight`",
                "tie_word_embeddings",
            ],
        ),
        fault(
            "misspelt tensor",
            json!({}),
            |bench| {
                rewrite(bench, |w| {
                    let up = w.remove(UP).expect("there");
                    w.insert(UP.replace("up_proj", "upproj"), up);
                });
            },
            BAD_INPUT,
            &["model.safetensors", UP, "upproj"],
        ),
        fault(
            "extra tensor",
            json!({}),
            |bench| {
                rewrite(bench, |w| {
                    w.insert(
                        "model.layers.2.mlp.up_proj.weight".into(),
                        (vec![1], vec![0.0]),
                    );
                });
            },
            BAD_INPUT,
            &[
                "model.safetensors",
                "model.layers.2.mlp.up_proj.weight",
                "config.json",
            ],
        ),
        fault(
            "misshapen tensor",
            json!({}),
            |bench| rewrite(bench, |w| w.get_mut(UP).expect("there").0 = vec![32, 48]),
            BAD_INPUT,
            &["model.safetensors", UP, "[32, 48]", "[48, 32]"],
        ),
    ]);
}

#[test]
fn faults_of_the_weight_files() {
    check(&[
        fault(
            "truncated safetensors",
            json!({}),
            |bench| {
                edit_bytes(&bench.path("base/model.safetensors"), |b| {
                    b.truncate(b.len() - 100);
                });
            },
            BAD_INPUT,
            &["model.safetensors", "bytes"],
        ),
        fault(
            "empty safetensors",
            json!({}),
            |bench| edit_bytes(&bench.path("base/model.safetensors"), Vec::clear),
            BAD_INPUT,
            &["model.safetensors"],
        ),
        fault(
            "a header that claims to be as long as memory",
            json!({}),
            |bench| {
                edit_bytes(&bench.path("base/model.safetensors"), |b| {
                    b[..8].copy_from_slice(&(u64::MAX - 7).to_le_bytes());
                });
            },
            BAD_INPUT,
            &["model.safetensors", "header"],
        ),
        fault(
            "a header whose offsets lie",
            json!({}),
            |bench| {
                let header = br#"{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,16]}}"#;
                let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
                bytes.extend_from_slice(header);
                bytes.extend_from_slice(&[0; 16]);
                std::fs::write(bench.path("base/model.safetensors"), bytes).expect("written");
            },
            BAD_INPUT,
            &["model.safetensors"],
        ),
        fault(
            "a header that is not JSON",
            json!({}),
            |bench| edit_bytes(&bench.path("base/model.safetensors"), |b| b[8] = b'x'),
            BAD_INPUT,
            &["model.safetensors", "header"],
        ),
        fault(
            "an index that points outside its directory",
            json!({}),
            |bench| {
                let base = bench.path("base");
                std::fs::rename(base.join("model.safetensors"), bench.path("m.safetensors"))
                    .expect("moved");
                let names = Shape::default().tensors().into_iter();
                let map: BTreeMap<String, &str> =
                    names.map(|(n, _)| (n, "../m.safetensors")).collect();
                let index = json!({"metadata": {}, "weight_map": map});
                write_json(&base.join("model.safetensors.index.json"), &index);
            },
            BAD_INPUT,
            &["model.safetensors.index.json", "../m.safetensors"],
        ),
        fault(
            "pickle only",
            json!({}),
            |bench| {
                let base = bench.path("base");
                std::fs::rename(
                    base.join("model.safetensors"),
                    base.join("pytorch_model.bin"),
                )
                .expect("moved");
            },
            BAD_INPUT,
            &["pytorch_model.bin", "safetensors", "pickle"],
        ),
        fault(
            "no weights",
            json!({}),
            |bench| std::fs::remove_file(bench.path("base/model.safetensors")).expect("there"),
            BAD_INPUT,
            &["model.safetensors"],
        ),
    ]);
}

#[test]
fn weights_with_nan_end_in_a_numeric_error_without_an_adapter() {
    for (name, changes) in [
        ("lora", json!({})),
        ("saving", json!({"save_strategy": "steps", "save_steps": 1})),
        ("full", json!({"use_peft": false})),
    ] {
        let bench = Workbench::new(4);
        rewrite(&bench, |w| w.get_mut(UP).expect("there").1[5] = f32::NAN);
        let finished = bench.train(name, &changes).expect(INTERNAL);
        for part in ["loss", "NaN", "step 1"] {
            assert!(finished.stderr.contains(part), "{}", finished.stderr);
        }
        // The log of the run may stay, a result may not.
        let left = entries(&bench.path(name));
        assert!(
            left.iter().all(|n| n == "trainer_log.jsonl"),
            "{name}: {left:?}"
        );
    }
}

#[test]
fn an_update_that_overflows_in_the_last_step_is_not_published() {
    for (name, file) in [
        ("lora", "adapter_model.safetensors"),
        ("full", "model.safetensors"),
    ] {
        let bench = Workbench::new(4);
        let changes = json!({
            "use_peft": name == "lora", "learning_rate": 1e39, "max_grad_norm": 0, "max_steps": 1,
        });
        let finished = bench.train(name, &changes).expect(INTERNAL);
        assert!(
            finished.stderr.contains("not finite after step 1"),
            "{}",
            finished.stderr
        );
        assert!(!bench.path(name).join(file).exists());
    }
}

#[test]
fn an_exploding_run_keeps_the_checkpoints_from_before() {
    let bench = Workbench::new(16);
    // The first step of the warmup is at learning rate 0.
    let changes = json!({
        "learning_rate": 1e39, "max_grad_norm": 0, "max_steps": 6, "warmup_steps": 2,
        "save_strategy": "steps", "save_steps": 1,
    });
    let finished = bench.train("out", &changes).expect(INTERNAL);
    assert!(
        finished.stderr.contains("learning_rate"),
        "{}",
        finished.stderr
    );
    let left = entries(&bench.path("out"));
    assert!(
        !left.iter().any(|n| n == "adapter_model.safetensors"),
        "{left:?}"
    );
    assert!(left.contains(&"checkpoint-1".to_owned()), "{left:?}");
}

#[test]
fn a_config_of_another_model_than_the_weights_is_not_merged() {
    let bench = Workbench::new(4);
    bench.train("out", &json!({})).expect(0);
    let (base, adapter, merged) = (bench.path("base"), bench.path("out"), bench.path("merged"));
    let ask = [
        "merge",
        "--model_name_or_path",
        text(&base),
        "--adapter",
        text(&adapter),
        "--output_dir",
        text(&merged),
    ];
    let whole = Shape::default();
    let wider = Shape {
        intermediate: 64,
        ..whole.clone()
    };
    let deeper = Shape {
        layers: 3,
        ..whole.clone()
    };
    for (shape, says) in [
        (wider, ["model.safetensors", "mlp.", "[64, 32]"]),
        (deeper, ["model.safetensors", "model.layers.2.", "missing"]),
    ] {
        write_json(&base.join("config.json"), &shape.config());
        let finished = ferrotune(&ask).expect(BAD_INPUT);
        for part in says {
            assert!(finished.stderr.contains(part), "{}", finished.stderr);
        }
        assert!(!merged.exists());
    }
    write_json(&base.join("config.json"), &whole.config());
    ferrotune(&ask).expect(0);
}

#[test]
fn an_adapter_that_does_not_fit_its_base_is_refused() {
    let bench = Workbench::new(4);
    bench.train("out", &json!({})).expect(0);
    let other = Shape {
        hidden: 48,
        ..Shape::default()
    };
    write_model(&bench.path("other"), &other, Stored::F32, 1);
    let (base, adapter) = (bench.path("other"), bench.path("out"));
    let merged = bench.path("merged");
    for command in [
        vec!["generate", "--prompt", "a"],
        vec!["merge", "--output-dir", text(&merged)],
    ] {
        let place = [
            "--model-name-or-path",
            text(&base),
            "--adapter",
            text(&adapter),
        ];
        let ask = [command.as_slice(), &place].concat();
        let other_weights = ["was trained on", text(&base), "--any-base"];
        let other_shapes = [text(&adapter), "model.layers.0.", "48"];
        for (switch, says) in [(None, other_weights), (Some("--any-base"), other_shapes)] {
            let ask: Vec<&str> = ask.iter().copied().chain(switch).collect();
            let finished = ferrotune(&ask).expect(BAD_INPUT);
            for part in says {
                assert!(finished.stderr.contains(part), "{}", finished.stderr);
            }
        }
    }
    assert!(!merged.exists());
}
