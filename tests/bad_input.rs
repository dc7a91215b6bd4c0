//! Bad input: the exit code, a message with the place, what was expected and the fix, and nothing
//! half-written.

mod common;

use common::{Shape, Stored, Workbench, entries, ferrotune, text, write_json, write_weights};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const BAD_INPUT: i32 = 65;
const INTERNAL: i32 = 70;
const CANNOT_WRITE: i32 = 73;
const BAD_CONFIG: i32 = 78;

/// One way to go wrong.
struct Fault {
    name: &'static str,
    /// Keys of the configuration.
    changes: Value,
    /// What happens to the files.
    spoil: fn(&Workbench),
    code: i32,
    /// What the message must hold: the place, what was expected, the fix.
    says: &'static [&'static str],
}

fn fault(
    name: &'static str,
    changes: Value,
    spoil: fn(&Workbench),
    code: i32,
    says: &'static [&'static str],
) -> Fault {
    Fault {
        name,
        changes,
        spoil,
        code,
        says,
    }
}

fn untouched(_: &Workbench) {}

/// Runs every fault on a bench of its own and reports all that are not as they should be.
fn check(faults: &[Fault]) {
    let mut wrong = Vec::new();
    for fault in faults {
        let bench = Workbench::new(6);
        (fault.spoil)(&bench);
        let finished = bench.train("out", &fault.changes);
        let mut complaints = Vec::new();
        if finished.code != Some(fault.code) {
            complaints.push(format!("code {:?}, expected {}", finished.code, fault.code));
        }
        let missing = fault.says.iter().filter(|p| !finished.stderr.contains(**p));
        complaints.extend(missing.map(|part| format!("does not say `{part}`")));
        if finished.stderr.contains("panicked") {
            complaints.push("panicked".to_owned());
        }
        let left = entries(&bench.path("out"));
        if !left.is_empty() {
            complaints.push(format!("left behind {left:?}"));
        }
        if !complaints.is_empty() {
            let stderr = finished.stderr.trim();
            wrong.push(format!(
                "{}: {}\n    {stderr}",
                fault.name,
                complaints.join(", ")
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn configuration() {
    check(&[
        fault(
            "unknown key",
            json!({"lerning_rate": 1e-4}),
            untouched,
            BAD_CONFIG,
            &["lerning_rate", "learning_rate", "out.yaml"],
        ),
        fault(
            "value of another type",
            json!({"max_steps": "many"}),
            untouched,
            BAD_CONFIG,
            &["max_steps", "many", "out.yaml"],
        ),
        fault(
            "unmatched target",
            json!({"lora_target_modules": ["q_prjo"]}),
            untouched,
            BAD_CONFIG,
            &["target_modules", "q_prjo", "q_proj"],
        ),
        fault(
            "one of several targets unmatched",
            json!({"lora_target_modules": ["q_proj", "v_porj"]}),
            untouched,
            BAD_CONFIG,
            &["target_modules", "v_porj", "v_proj"],
        ),
        fault(
            "no threads",
            json!({"num_threads": 0}),
            untouched,
            BAD_CONFIG,
            &["num_threads", "1 or more"],
        ),
        fault(
            "more threads than any machine has",
            json!({"num_threads": 4_000_000_000_u64}),
            untouched,
            BAD_CONFIG,
            &["num_threads", "expected"],
        ),
        fault(
            "threads below nothing",
            json!({"num_threads": -2}),
            untouched,
            BAD_CONFIG,
            &["num_threads", "-2", "expected"],
        ),
        fault(
            "unknown schedule",
            json!({"lr_scheduler_type": "cosin"}),
            untouched,
            BAD_CONFIG,
            &["lr_scheduler_type", "cosin", "cosine"],
        ),
        fault(
            "no such base",
            json!({"model_name_or_path": "/no/such/model"}),
            untouched,
            BAD_CONFIG,
            &["model_name_or_path", "/no/such/model", "directory"],
        ),
        fault(
            "no such data",
            json!({"dataset_name": "/no/such/rows.jsonl"}),
            untouched,
            BAD_CONFIG,
            &["dataset_name", "/no/such/rows.jsonl", ".jsonl"],
        ),
        fault(
            "context longer than the model's",
            json!({"max_length": null}),
            |bench| {
                let long = json!({"text": "word ".repeat(80)});
                common::write_rows(&bench.path("rows.jsonl"), &[long]);
            },
            BAD_CONFIG,
            &["max_length", "max_position_embeddings", "256", "401"],
        ),
        fault(
            "rank 0",
            json!({"lora_r": 0}),
            untouched,
            BAD_CONFIG,
            &["lora_r", "1 or more"],
        ),
    ]);
}

fn edit_config(bench: &Workbench, key: &str, value: Value) {
    let path = bench.path("base/config.json");
    let mut config = common::read_json(&path);
    config[key] = value;
    write_json(&path, &config);
}

#[test]
fn model_config_and_tokenizer() {
    check(&[
        fault(
            "no config.json",
            json!({}),
            |bench| std::fs::remove_file(bench.path("base/config.json")).expect("there"),
            BAD_INPUT,
            &["config.json", "Hugging Face model directory"],
        ),
        fault(
            "config.json is not JSON",
            json!({}),
            |bench| std::fs::write(bench.path("base/config.json"), "{\"a\": ").expect("written"),
            BAD_INPUT,
            &["config.json", "not valid JSON"],
        ),
        fault(
            "unknown architecture",
            json!({}),
            |bench| edit_config(bench, "model_type", json!("lama")),
            BAD_INPUT,
            &["config.json", "model_type", "lama", "llama"],
        ),
        fault(
            "unsupported rope type",
            json!({}),
            |bench| {
                let scaling = json!({"rope_type": "yarm", "factor": 2.0});
                edit_config(bench, "rope_scaling", scaling);
            },
            BAD_INPUT,
            &["config.json", "rope_type", "yarm", "yarn"],
        ),
        fault(
            "rope without its factor",
            json!({}),
            |bench| edit_config(bench, "rope_scaling", json!({"rope_type": "linear"})),
            BAD_INPUT,
            &["config.json", "factor"],
        ),
        fault(
            "heads that do not divide the width",
            json!({}),
            |bench| {
                edit_config(bench, "head_dim", Value::Null);
                edit_config(bench, "num_attention_heads", json!(5));
            },
            BAD_INPUT,
            &["config.json", "num_attention_heads", "5", "32", "head_dim"],
        ),
        fault(
            "key heads that do not divide the heads",
            json!({}),
            |bench| edit_config(bench, "num_key_value_heads", json!(3)),
            BAD_INPUT,
            &["config.json", "num_key_value_heads", "3", "4"],
        ),
        fault(
            "no layers",
            json!({}),
            |bench| edit_config(bench, "num_hidden_layers", json!(0)),
            BAD_INPUT,
            &["config.json", "num_hidden_layers", "positive integer"],
        ),
        fault(
            "sizes that overflow",
            json!({}),
            |bench| {
                edit_config(bench, "hidden_size", json!(1_u64 << 39));
                edit_config(bench, "vocab_size", json!(1_u64 << 39));
            },
            BAD_INPUT,
            &["model.safetensors", "shape"],
        ),
        fault(
            "more layers than anything",
            json!({}),
            |bench| edit_config(bench, "num_hidden_layers", json!(1_u64 << 39)),
            BAD_INPUT,
            &["num_hidden_layers", "expected"],
        ),
        fault(
            "no tokenizer.json",
            json!({}),
            |bench| std::fs::remove_file(bench.path("base/tokenizer.json")).expect("there"),
            BAD_INPUT,
            &["tokenizer.json", "missing"],
        ),
        fault(
            "tokenizer.json is none",
            json!({}),
            |bench| std::fs::write(bench.path("base/tokenizer.json"), "{}").expect("written"),
            BAD_INPUT,
            &["tokenizer.json"],
        ),
        fault(
            "a token outside the model's vocabulary",
            json!({}),
            |bench| {
                let shape = Shape {
                    vocab: 40,
                    ..Shape::default()
                };
                common::write_model(&bench.path("base"), &shape, Stored::F32, 1);
            },
            BAD_INPUT,
            &["vocab"],
        ),
    ]);
}

type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn rewrite(bench: &Workbench, change: impl FnOnce(&mut Weights)) {
    let mut weights = Shape::default().weights(7);
    change(&mut weights);
    let path = bench.path("base/model.safetensors");
    write_weights(&path, weights.iter(), Stored::F32);
}

fn edit_bytes(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = common::read(path);
    change(&mut bytes);
    std::fs::write(path, bytes).expect("writable");
}

const UP: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn weights() {
    check(&[
        fault(
            "missing tensor",
            json!({}),
            |bench| rewrite(bench, |w| drop(w.remove(UP))),
            BAD_INPUT,
            &["model.safetensors", UP, "missing"],
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
        fault(
            "truncated safetensors",
            json!({}),
            |bench| {
                edit_bytes(&bench.path("base/model.safetensors"), |b| {
                    b.truncate(b.len() - 100)
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
            &["model.safetensors", "JSON"],
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

fn write_lines(bench: &Workbench, lines: &[&[u8]]) {
    let text: Vec<u8> = lines
        .iter()
        .flat_map(|l| [l, b"\n".as_slice()].concat())
        .collect();
    std::fs::write(bench.path("rows.jsonl"), text).expect("writable");
}

const GOOD: &[u8] = br#"{"text": "good"}"#;

#[test]
fn data() {
    check(&[
        fault(
            "broken JSON in line 3",
            json!({}),
            |bench| write_lines(bench, &[GOOD, GOOD, br#"{"text": "bad"#, GOOD]),
            BAD_INPUT,
            &["rows.jsonl:3", "JSON"],
        ),
        fault(
            "invalid UTF-8 in line 2",
            json!({}),
            |bench| write_lines(bench, &[GOOD, b"{\"text\": \"\xff\xfe\"}"]),
            BAD_INPUT,
            &["rows.jsonl:2", "UTF-8"],
        ),
        fault(
            "a list in line 2",
            json!({}),
            |bench| write_lines(bench, &[GOOD, b"[1, 2]"]),
            BAD_INPUT,
            &["rows.jsonl:2", "object"],
        ),
        fault(
            "a row of no known kind",
            json!({}),
            |bench| write_lines(bench, &[br#"{"question": "a", "reply": "b"}"#]),
            BAD_INPUT,
            &["rows.jsonl:1", "messages", "prompt", "text"],
        ),
        fault(
            "a row of another kind in line 2",
            json!({}),
            |bench| write_lines(bench, &[GOOD, br#"{"prompt": "a", "completion": "b"}"#]),
            BAD_INPUT,
            &["rows.jsonl:2", "text"],
        ),
        fault(
            "a message without content",
            json!({}),
            |bench| write_lines(bench, &[br#"{"messages": [{"role": "user"}]}"#]),
            BAD_INPUT,
            &["rows.jsonl:1", "content"],
        ),
        fault(
            "no trained token in any row",
            json!({"max_length": 4}),
            |bench| {
                let row: &[u8] = br#"{"prompt": "longer than four", "completion": "x"}"#;
                write_lines(bench, &[row, row]);
            },
            BAD_INPUT,
            &["rows.jsonl", "max_length"],
        ),
        fault(
            "no rows",
            json!({}),
            |bench| write_lines(bench, &[]),
            BAD_INPUT,
            &["rows.jsonl", "no "],
        ),
    ]);
}

#[test]
fn an_output_directory_whose_parent_is_a_file_is_not_writable() {
    let bench = Workbench::new(4);
    let file = bench.path("file");
    std::fs::write(&file, "a file").expect("writable");
    let changes = json!({"output_dir": file.join("out")});
    let finished = bench.train("run", &changes).expect(CANNOT_WRITE);
    assert!(
        finished.stderr.contains("cannot write") && finished.stderr.contains(text(&file)),
        "{}",
        finished.stderr
    );
    assert_eq!(common::read(&file), b"a file");
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
fn an_exploding_run_keeps_the_checkpoints_from_before() {
    let bench = Workbench::new(16);
    let changes = json!({
        "learning_rate": 1e38, "max_grad_norm": 0, "max_steps": 6, "lora_alpha": 1e30,
        "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1,
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
fn rows_without_a_trained_token_are_dropped_and_counted() {
    let bench = Workbench::new(4);
    let row: &[u8] = br#"{"prompt": "a long prompt without end", "completion": "x"}"#;
    write_lines(&bench, &[row, br#"{"prompt": "a", "completion": "b"}"#]);
    let changes = json!({"max_length": 6, "per_device_train_batch_size": 1});
    bench.train("out", &changes).expect(0);
    let run = common::read_json(&bench.path("out/run.json"));
    assert_eq!(run["data"]["dropped_rows"], 1, "{run}");
}

#[test]
fn an_adapter_that_does_not_fit_its_base_is_refused() {
    let bench = Workbench::new(4);
    bench.train("out", &json!({})).expect(0);
    let other = Shape {
        hidden: 48,
        ..Shape::default()
    };
    common::write_model(&bench.path("other"), &other, Stored::F32, 1);
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
        let finished = ferrotune(&[command.as_slice(), &place].concat()).expect(BAD_INPUT);
        assert!(
            finished.stderr.contains("adapter_model.safetensors")
                && finished.stderr.contains("lora_"),
            "{}",
            finished.stderr
        );
    }
    assert!(!merged.exists());
}

#[test]
fn bad_command_lines_are_usage_errors() {
    for arguments in [
        vec!["trian"],
        vec!["train"],
        vec!["generate", "--model-name-or-path", "x"],
    ] {
        ferrotune(&arguments).expect(2);
    }
    let finished = ferrotune(&["train", "/no/such/config.yaml"]);
    assert!(
        matches!(finished.code, Some(65 | 78)) && finished.stderr.contains("/no/such/config.yaml"),
        "{finished:?}"
    );
}
