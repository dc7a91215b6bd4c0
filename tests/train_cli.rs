//! `train` from files to files, and what `merge`, `generate` and `eval` make of its result.

mod common;

use common::{
    Finished, Shape, Stored, Workbench, chat_rows, command, entries, ferrotune, read_json, tensors,
    text, write_model, write_rows, write_sharded_model,
};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

const RESULT: [&str; 11] = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "all_results.json",
    "base_weights.json",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_results.json",
    "trainer_log.jsonl",
    "trainer_state.json",
];

/// Losses of the log, in order.
fn losses(output: &Path) -> Vec<f64> {
    let state = read_json(&output.join("trainer_state.json"));
    let history = state["log_history"].as_array().expect("a list");
    history.iter().filter_map(|r| r["loss"].as_f64()).collect()
}

/// Long enough to learn something.
fn longer(more: &Value) -> Value {
    let mut changes = json!({"max_steps": 25, "lr_scheduler_type": "constant"});
    let more = more.as_object().expect("an object").clone();
    changes.as_object_mut().expect("an object").extend(more);
    changes
}

#[track_caller]
fn assert_learnt(bench: &Workbench, name: &str) {
    let losses = losses(&bench.path(name));
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(
        last < 0.8 * first,
        "{name}: loss went from {first} to {last}"
    );
}

#[test]
fn every_kind_of_row_trains_and_leaves_a_complete_result() {
    let prompt_completion: Vec<Value> = (0..16)
        .map(|i| json!({"prompt": format!("{i} is "), "completion": format!("number {i}")}))
        .collect();
    let plain: Vec<Value> = (0..16)
        .map(|i| json!({"text": format!("the text of row {i}.")}))
        .collect();
    let bench = Workbench::new(16);
    for (kind, rows) in [
        ("messages", chat_rows(16)),
        ("prompt_completion", prompt_completion),
        ("text", plain),
    ] {
        write_rows(&bench.path("rows.jsonl"), &rows);
        bench.train(kind, &longer(&json!({}))).expect(0);
        assert_learnt(&bench, kind);
        assert_eq!(entries(&bench.path(kind)), RESULT, "{kind}");
    }
}

#[test]
fn the_result_is_in_the_formats_of_peft_and_transformers() {
    let bench = Workbench::new(16);
    let changes = json!({"eval_file": bench.path("rows.jsonl"), "eval_strategy": "steps",
                         "save_strategy": "steps", "save_steps": 2, "use_rslora": true});
    bench.train("out", &changes).expect(0);
    let output = bench.path("out");

    let adapter = read_json(&output.join("adapter_config.json"));
    assert_eq!(adapter["peft_type"], "LORA");
    assert_eq!(adapter["r"], 4);
    assert_eq!(adapter["use_rslora"], true);
    let weights = tensors(&output.join("adapter_model.safetensors"));
    assert_eq!(weights.len(), 3 * 2 * 2, "{:?}", weights.keys());
    assert!(
        weights
            .keys()
            .all(|n| n.starts_with("base_model.model.model.layers."))
    );

    let state = read_json(&output.join("trainer_state.json"));
    assert_eq!(state["global_step"], 3);
    assert_eq!(state["max_steps"], 3);
    let history = state["log_history"].as_array().expect("a list");
    let has = |key: &str| history.iter().any(|row| row.get(key).is_some());
    for key in [
        "loss",
        "grad_norm",
        "learning_rate",
        "mean_token_accuracy",
        "entropy",
        "num_tokens",
        "eval_loss",
        "eval_mean_token_accuracy",
    ] {
        assert!(has(key), "no row of log_history has {key}: {history:#?}");
    }
    let results = read_json(&output.join("train_results.json"));
    for key in [
        "train_loss",
        "train_runtime",
        "train_samples_per_second",
        "epoch",
    ] {
        assert!(results[key].is_number(), "{key}: {results}");
    }
    let card = String::from_utf8(common::read(&output.join("README.md"))).expect("UTF-8");
    assert!(
        card.starts_with("---\n") && card.contains("base_model"),
        "{card}"
    );
    let names = entries(&output.join("checkpoint-2"));
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
        "tokenizer.json",
    ] {
        assert!(
            names.contains(&file.to_owned()),
            "{file} is not in {names:?}"
        );
    }
}

#[test]
fn standard_output_is_one_json_object_per_line() {
    let bench = Workbench::new(8);
    let finished = bench.train("out", &json!({})).expect(0);
    let rows: Vec<Value> = finished
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert!(rows.iter().all(Value::is_object));
    let with_loss = rows.iter().filter(|r| r.get("loss").is_some()).count();
    assert_eq!(with_loss, 3, "{}", finished.stdout);
}

#[test]
fn a_run_whose_reader_goes_away_trains_on_and_writes_its_files() {
    let bench = Workbench::new(16);
    let config = bench.config("out", &longer(&json!({})));
    let mut child = command(&["train", text(&config), "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut reader = BufReader::new(child.stdout.take().expect("piped"));
    reader.read_line(&mut String::new()).expect("readable");
    drop((reader, child.stderr.take()));
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert_eq!(entries(&bench.path("out")), RESULT);
    assert_eq!(losses(&bench.path("out")).len(), 25);
}

#[test]
fn an_error_that_nobody_reads_keeps_its_exit_code() {
    let bench = Workbench::new(4);
    let config = bench.config("out", &json!({"max_steps": 0}));
    let mut child = command(&["train", text(&config)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().expect("it ends").code(), Some(78));
}

#[test]
fn a_rank_above_the_smaller_dimension_of_a_weight_is_noted() {
    let bench = Workbench::new(4);
    // v_proj is 16 x 32, the other targets are larger both ways.
    let finished = bench
        .train("out", &json!({"lora_r": 20, "max_steps": 1}))
        .expect(0);
    for part in [
        "note: lora_r: rank 20 of `model.layers.0.self_attn.v_proj` (and 1 more)",
        "16 x 32",
    ] {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
    let finished = bench
        .train("fits", &json!({"lora_r": 16, "max_steps": 1}))
        .expect(0);
    assert_eq!(finished.stderr, "");
}

#[test]
fn a_dry_run_shows_the_plan_and_writes_nothing() {
    let bench = Workbench::new(8);
    let config = bench.config("out", &json!({}));
    let finished = ferrotune(&["train", text(&config), "--dry-run"]).expect(0);
    let mut plan: Value =
        serde_json::from_str(&finished.stdout).expect("JSON where no one watches");
    assert_eq!(plan["total_steps"], 3);
    assert_eq!(plan["rows"], 8);
    // q: 32+32, v: 32+16, down: 48+32 columns and rows, rank 4, two layers.
    assert_eq!(plan["trainable_parameters"], 4 * 2 * (64 + 48 + 80));
    assert_eq!(entries(&bench.path("out")), [""; 0]);
    let same = ferrotune(&["plan", text(&config)]).expect(0);
    let mut same: Value = serde_json::from_str(&same.stdout).expect("JSON too");
    // Others take and give back memory and time meanwhile.
    for plan in [&mut plan, &mut same] {
        let available = plan["available_memory_bytes"].take();
        assert!(available.is_u64(), "{available}");
        let least = plan["least_time"].take()["seconds"].as_f64();
        assert!(least > Some(0.0), "{least:?}");
    }
    assert_eq!(same, plan);
}

#[test]
fn any_key_can_be_overridden_on_the_command_line() {
    let bench = Workbench::new(8);
    let config = bench.config("out", &json!({}));
    let elsewhere = bench.path("elsewhere");
    let arguments = [
        "train",
        text(&config),
        "--output_dir",
        text(&elsewhere),
        "--max-steps=2",
        "--lora_target_modules",
        "q_proj",
        "k_proj",
        "--lora_r",
        "3",
    ];
    ferrotune(&arguments).expect(0);
    let adapter = read_json(&elsewhere.join("adapter_config.json"));
    assert_eq!(adapter["r"], 3);
    assert_eq!(losses(&elsewhere).len(), 2);
    assert!(!bench.path("out").exists());
}

#[test]
fn help_after_the_config_file_is_help_and_nothing_else() {
    // The file need not even be there.
    for command in ["train", "plan"] {
        let finished = ferrotune(&[command, "none.yaml", "--max_steps", "2", "--help"]).expect(0);
        for part in [&format!("Usage: ferrotune {command}"), "config-schema"] {
            assert!(
                finished.stdout.contains(part),
                "{part}: {}",
                finished.stdout
            );
        }
        let asked_first = ferrotune(&[command, "--help"]).expect(0);
        assert_eq!(asked_first.stdout, finished.stdout);
    }
}

#[test]
fn an_override_without_its_value_or_with_a_word_too_many_is_a_usage_error() {
    let bench = Workbench::new(4);
    let config = bench.config("out", &json!({}));
    for (words, part) in [
        (vec!["--output_dir"], "`--output_dir` needs a value"),
        (vec!["--run_name", "my", "run"], "`run`"),
    ] {
        let arguments = [vec!["train", text(&config)], words].concat();
        let finished = ferrotune(&arguments).expect(2);
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
    assert!(!bench.path("out").exists());
    // Blanks in one argument belong to the value, in a list too.
    std::fs::rename(bench.path("rows.jsonl"), bench.path("my rows.jsonl")).expect("renamed");
    let rows = bench.path("my rows.jsonl");
    ferrotune(&["plan", text(&config), "--dataset_name", text(&rows)]).expect(0);
}

#[test]
fn a_sharded_base_trains_to_the_same_bytes_as_a_single_file() {
    let bench = Workbench::new(8);
    bench.train("single", &json!({})).expect(0);
    let sharded = bench.path("sharded_base");
    write_sharded_model(&sharded, &Shape::default(), 7);
    let changes = json!({"model_name_or_path": sharded});
    bench.train("sharded", &changes).expect(0);
    let bytes = |name: &str| common::read(&bench.path(name).join("adapter_model.safetensors"));
    assert!(bytes("single") == bytes("sharded"));
}

#[test]
fn half_precision_bases_train_and_their_adapters_stay_float32() {
    let bench = Workbench::new(16);
    for (name, stored) in [("f16", Stored::F16), ("bf16", Stored::Bf16)] {
        write_model(&bench.path("base"), &Shape::default(), stored, 7);
        for (suffix, changes) in [("", json!({})), ("_bf16_pass", json!({"bf16": true}))] {
            let name = format!("{name}{suffix}");
            bench.train(&name, &longer(&changes)).expect(0);
            assert_learnt(&bench, &name);
        }
    }
}

#[test]
fn packing_trains_on_the_same_tokens() {
    let bench = Workbench::new(24);
    bench
        .train(
            "rows",
            &json!({"per_device_train_batch_size": 24, "max_steps": 1}),
        )
        .expect(0);
    let changes = json!({"packing": true, "max_length": 200, "max_steps": 1,
                         "per_device_train_batch_size": 24});
    bench.train("packed", &changes).expect(0);
    let (rows, packed) = (
        losses(&bench.path("rows"))[0],
        losses(&bench.path("packed"))[0],
    );
    assert!((rows - packed).abs() < 1e-5 * rows, "{rows} and {packed}");
}

fn generate(model: &Path, adapter: Option<&Path>, more: &[&str]) -> Finished {
    let mut arguments = vec!["generate", "--json", "--model-name-or-path", text(model)];
    if let Some(adapter) = adapter {
        arguments.extend(["--adapter", text(adapter)]);
    }
    arguments.extend(more);
    ferrotune(&arguments).expect(0)
}

fn answers(finished: &Finished) -> Vec<String> {
    let answer = |line: &str| {
        let row: Value = serde_json::from_str(line).expect("JSON");
        row["answer"].as_str().expect("an answer").to_owned()
    };
    finished.stdout.lines().map(answer).collect()
}

const PROMPTS: [&str; 8] = [
    "--prompt",
    "1+2=?",
    "--prompt",
    "7+7=?",
    "--prompt",
    "a much longer prompt",
    "--prompt",
    "4",
];

/// A bench with an adapter in `out` that changes the answers.
fn trained(changes: &Value) -> Workbench {
    let bench = Workbench::new(24);
    bench.train("out", &longer(changes)).expect(0);
    bench
}

#[test]
fn a_merged_model_answers_as_the_adapter_on_its_base() {
    let bench = trained(&json!({"use_rslora": true}));
    let (base, adapter) = (bench.path("base"), bench.path("out"));
    let greedy = [PROMPTS.as_slice(), &["--max-new-tokens", "24"]].concat();
    let with_adapter = answers(&generate(&base, Some(&adapter), &greedy));
    assert_ne!(with_adapter, answers(&generate(&base, None, &greedy)));
    let merged = bench.path("merged");
    let place = [
        "--model-name-or-path",
        text(&base),
        "--adapter",
        text(&adapter),
    ];
    let command = ["merge", "--output-dir", text(&merged), "--json"];
    let report = ferrotune(&[command.as_slice(), &place].concat()).expect(0);
    let report: Value = serde_json::from_str(&report.stdout).expect("JSON");
    assert_eq!(report["merged_tensors"], 6);
    assert_eq!(answers(&generate(&merged, None, &greedy)), with_adapter);
    // A second merge does not overwrite the first by accident.
    let again = ferrotune(&[command.as_slice(), &place].concat());
    assert_ne!(again.code, Some(0), "{}", again.stdout);
}

#[test]
fn answers_do_not_depend_on_the_batch() {
    let bench = trained(&json!({}));
    let (base, adapter) = (bench.path("base"), bench.path("out"));
    for sampling in [
        vec!["--max-new-tokens", "20"],
        vec![
            "--max-new-tokens",
            "20",
            "--temperature",
            "1.3",
            "--top-p",
            "0.9",
            "--seed",
            "5",
        ],
    ] {
        let run = |batch: &str| {
            let size = ["--batch-size", batch];
            let arguments = [PROMPTS.as_slice(), &sampling, &size].concat();
            answers(&generate(&base, Some(&adapter), &arguments))
        };
        let one_by_one = run("1");
        assert_eq!(one_by_one.len(), 4);
        assert_eq!(run("4"), one_by_one);
        assert_eq!(run("3"), one_by_one);
    }
}

#[test]
fn sampling_is_repeatable_by_its_seed() {
    let bench = Workbench::new(4);
    let run = |seed: &str| {
        let sampling = [
            "--max-new-tokens",
            "20",
            "--temperature",
            "1.5",
            "--seed",
            seed,
        ];
        answers(&generate(
            &bench.path("base"),
            None,
            &[PROMPTS.as_slice(), &sampling].concat(),
        ))
    };
    assert_eq!(run("1"), run("1"));
    assert_ne!(run("1"), run("2"));
}

#[test]
fn a_cached_answer_equals_one_computed_from_the_start() {
    let bench = trained(&json!({}));
    let (base, adapter) = (bench.path("base"), bench.path("out"));
    let run = |tokens: &str| {
        let arguments = ["--prompt", "5+3=?", "--max-new-tokens", tokens];
        answers(&generate(&base, Some(&adapter), &arguments))[0].clone()
    };
    let long = run("12");
    for tokens in ["1", "4", "9"] {
        assert!(long.starts_with(&run(tokens)), "{long}");
    }
}

#[test]
fn the_ends_of_the_ranges_of_sampling_are_handled() {
    let bench = Workbench::new(2);
    let base = bench.path("base");
    let run = |more: &[&str]| {
        answers(&generate(
            &base,
            None,
            &[&["--prompt", "1+2=?"], more].concat(),
        ))
    };
    let short = ["--max-new-tokens", "8"];
    let tiny = [&short[..], &["--temperature", "1e-300"]].concat();
    assert_eq!(run(&tiny), run(&short));

    let ask = [
        "generate",
        "--prompt",
        "a",
        "--model-name-or-path",
        text(&base),
    ];
    let most = usize::MAX.to_string();
    let refused = ferrotune(&[&ask[..], &["--max-new-tokens", &most]].concat()).expect(78);
    assert!(refused.stderr.contains("256 tokens"), "{}", refused.stderr);
    // Refused before a model is looked for.
    let nowhere = [
        "generate",
        "--prompt",
        "a",
        "--model-name-or-path",
        "nowhere",
    ];
    ferrotune(&[&nowhere[..], &["--top-k", "0"]].concat()).expect(2);
}

#[test]
fn full_fine_tuning_writes_a_model_that_answers_as_it_learnt() {
    let bench = Workbench::new(2);
    let rows: Vec<Value> = ["ping", "pang"]
        .iter()
        .zip(["pong", "boom"])
        .map(|(prompt, answer)| {
            json!({"messages": [{"role": "user", "content": prompt},
                                {"role": "assistant", "content": answer}]})
        })
        .collect();
    write_rows(&bench.path("rows.jsonl"), &rows);
    for (name, tied) in [("untied", false), ("tied", true)] {
        let shape = Shape {
            tied,
            ..Shape::default()
        };
        write_model(&bench.path("base"), &shape, Stored::F32, 7);
        let changes = json!({"use_peft": false, "max_steps": 60, "learning_rate": 3e-3,
                             "lr_scheduler_type": "constant"});
        bench.train(name, &changes).expect(0);
        let output = bench.path(name);
        let names = entries(&output);
        for file in [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "README.md",
        ] {
            assert!(
                names.contains(&file.to_owned()),
                "{name}: no {file} in {names:?}"
            );
        }
        assert!(!names.contains(&"adapter_config.json".to_owned()));
        let prompts = [
            "--prompt",
            "ping",
            "--prompt",
            "pang",
            "--max-new-tokens",
            "12",
        ];
        let said = answers(&generate(&output, None, &prompts));
        assert_eq!(said, ["pong", "boom"], "{name}");
    }
}

#[test]
fn eval_reports_the_loss_that_training_saw() {
    let bench = Workbench::new(12);
    let rows = bench.path("rows.jsonl");
    let all = json!({"per_device_train_batch_size": 12, "max_steps": 1, "learning_rate": 0});
    bench.train("out", &all).expect(0);
    let first = losses(&bench.path("out"))[0];
    let place = [
        "--model-name-or-path",
        text(&bench.path("base")).to_owned().leak(),
    ];
    let command = ["eval", "--data", text(&rows)];
    let finished = ferrotune(&[command.as_slice(), &place].concat()).expect(0);
    let result: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    let loss = result["eval_loss"].as_f64().expect("a number");
    assert!((loss - first).abs() < 1e-5 * first, "{loss} and {first}");
}

#[test]
fn a_directory_that_is_no_adapter_is_called_one() {
    let bench = Workbench::new(4);
    let base = bench.path("base");
    let asked = ["--prompt", "a", "--model-name-or-path", text(&base)];
    let finished = ferrotune(&[&["generate", "--adapter", text(&base)][..], &asked].concat());
    let finished = finished.expect(65);
    for part in ["is no PEFT adapter", "a whole model (model.safetensors)"] {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
}
