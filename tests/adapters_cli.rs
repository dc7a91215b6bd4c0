//! `train` with `adapters` and with `--sweep`: several runs over one base, each as it would be alone.
#![cfg(unix)]

mod common;

use common::{Workbench, command, entries, ferrotune, read_json, tensors, text};
use ferrotune::core::config::{Runs, load_runs};
use ferrotune::recipe::Together;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// Largest difference of any value, over the largest of all.
fn apart(a: &Path, b: &Path) -> f32 {
    let [a, b] = [a, b].map(|directory| tensors(&directory.join("adapter_model.safetensors")));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let values = |t: &[f32]| t.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let largest = b.values().map(|t| values(t)).fold(0.0, f32::max);
    let differences = a.iter().map(|(name, a)| {
        let pairs = a.iter().zip(&b[name]);
        pairs.fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()))
    });
    differences.fold(0.0, f32::max) / largest
}

fn losses(output: &Path) -> Vec<f64> {
    let state = read_json(&output.join("trainer_state.json"));
    let history = state["log_history"].as_array().expect("a list");
    let of = |key: &str| {
        history
            .iter()
            .filter_map(|row| row[key].as_f64())
            .collect::<Vec<_>>()
    };
    [of("loss"), of("eval_loss")].concat()
}

/// Other rows, ranks, rates, batches, lengths and seeds.
fn adapters(bench: &Workbench) -> Vec<Value> {
    let rows: Vec<Value> = (0..9)
        .map(|i| json!({"text": format!("row {i} of another file.")}))
        .collect();
    let file = bench.path("other.jsonl");
    common::write_rows(&file, &rows);
    vec![
        json!({"name": "first", "max_steps": 8}),
        json!({
            "name": "second", "lora_r": 2, "use_dora": true, "learning_rate": 0.003, "seed": 7,
            "dataset_name": file, "lora_dropout": 0.2, "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2, "loraplus_lr_ratio": 4.0,
        }),
        json!({"name": "third", "lora_target_modules": "all-linear", "lr_scheduler_type": "constant"}),
    ]
}

fn evaluated(bench: &Workbench) -> Value {
    json!({
        "eval_file": bench.path("rows.jsonl"), "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "max_steps": 5,
    })
}

fn with(a: &Value, b: &Value) -> Value {
    let mut all = a.as_object().expect("an object").clone();
    all.extend(b.as_object().expect("an object").clone());
    Value::Object(all)
}

#[test]
fn every_adapter_of_a_run_is_the_one_trained_alone() {
    let bench = Workbench::new(12);
    let (shared, adapters) = (evaluated(&bench), adapters(&bench));
    let run = bench.train("all", &with(&shared, &json!({ "adapters": adapters })));
    let run = run.expect(0);
    let report = read_json(&bench.path("all").join("adapters.json"));
    for (number, adapter) in adapters.iter().enumerate() {
        let name = adapter["name"].as_str().expect("a text");
        let mut own = adapter.clone();
        own.as_object_mut().expect("an object").remove("name");
        let alone = format!("alone_{name}");
        bench.train(&alone, &with(&shared, &own)).expect(0);
        let (together, alone) = (bench.path("all").join(name), bench.path(&alone));
        assert_eq!(entries(&together), entries(&alone), "{name}");
        let error = apart(&together, &alone);
        assert!(error < 1e-5, "{name}: {error}");
        let [found, expected] = [&together, &alone].map(|output| losses(output));
        assert_eq!(found.len(), expected.len(), "{name}");
        let mut pairs = found.iter().zip(&expected);
        assert!(
            pairs.all(|(a, b)| (a - b).abs() < 1e-5),
            "{name}: {found:?} {expected:?}"
        );
        let row = &report["adapters"][number];
        assert_eq!(row["name"], name);
        assert_eq!(
            row["steps"],
            read_json(&alone.join("trainer_state.json"))["global_step"]
        );
        assert!(row["eval_loss"].as_f64().is_some(), "{row}");
        // Whose line it is, for whoever reads them.
        let theirs = run
            .stdout
            .lines()
            .filter(|line| line.contains(&format!(r#""adapter":"{name}""#)));
        assert!(theirs.count() > 5, "{}", run.stdout);
    }
    assert_eq!(report["adapters"][1]["keys"]["lora_r"], 2);
    // Again: all have their results.
    let again = with(
        &with(&shared, &json!({ "adapters": adapters })),
        &json!({"resume_from_checkpoint": "auto"}),
    );
    bench.train("all", &again).expect(0);
}

/// Norms of DoRA are there from forward to backward for each adapter that has them.
#[test]
fn a_plan_counts_what_each_adapter_makes_of_its_own() {
    let bench = Workbench::new(8);
    let working = |second_has_dora: bool| {
        let names = json!([
            {"name": "first", "use_dora": true},
            {"name": "second", "use_dora": second_has_dora},
        ]);
        let keys = json!({"adapters": names, "lora_target_modules": ["q_proj", "down_proj"], "device": "cpu"});
        let config = bench.config(&format!("plan_{second_has_dora}"), &keys);
        let Runs::Several(configs) = load_runs(&config, &[], &[]).expect("valid") else {
            panic!("two adapters are several runs");
        };
        let together = Together::prepare(configs).expect("fits");
        together.activations().bytes.working
    };
    let shape = common::Shape::default();
    // An f32 for each row of q_proj and of down_proj in each layer.
    let norms = 4 * shape.layers * (shape.heads * shape.head_dim + shape.hidden);
    let more = working(true) - working(false);
    assert!(more >= norms as u64, "{more} of at least {norms}");
}

#[test]
fn a_sweep_trains_every_choice_and_reports_them_in_one_place() {
    let bench = Workbench::new(8);
    let config = bench.config("swept", &json!({"max_steps": 2}));
    let swept = ["--sweep", "lora_r=2,4", "learning_rate=1e-3,1e-2"];
    let plan = ferrotune(&[&["plan", text(&config)], &swept[..]].concat()).expect(0);
    let plan: Value = serde_json::from_str(&plan.stdout).expect("JSON");
    assert_eq!(plan["adapters"].as_array().map(Vec::len), Some(4));
    ferrotune(&[&["train", text(&config)], &swept[..]].concat()).expect(0);
    let report = read_json(&bench.path("swept").join("adapters.json"));
    let rows = report["adapters"].as_array().expect("a list");
    let losses: Vec<f64> = rows
        .iter()
        .filter_map(|r| r["train_loss"].as_f64())
        .collect();
    assert_eq!(losses.len(), 4);
    let apart = bench.path("swept").join("lora_r=4_learning_rate=1e-2");
    assert_eq!(read_json(&apart.join("adapter_config.json"))["r"], 4);
    assert_eq!(rows[3]["keys"], json!({"lora_r": 4, "learning_rate": 0.01}));
}

#[test]
fn a_signal_stops_all_with_checkpoints_and_the_resume_is_the_run() {
    let bench = Workbench::new(64);
    let adapters = json!([{"name": "a"}, {"name": "b", "lora_r": 2, "seed": 3, "max_steps": 60}]);
    let changes = json!({
        "adapters": adapters, "max_steps": 80, "per_device_train_batch_size": 16, "lora_dropout": 0.1,
        "save_strategy": "steps", "save_steps": 1000, "resume_from_checkpoint": "auto",
    });
    bench.train("whole", &changes).expect(0);
    let config = bench.config("stopped", &changes);
    let mut child = command(&["train", text(&config)])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let step = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("\"loss\"")));
    assert!(step.is_some(), "the run ended before its first step");
    let killed = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status();
    assert!(killed.expect("kill runs").success());
    lines.for_each(drop);
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
    for name in ["a", "b"] {
        let found = entries(&bench.path("stopped").join(name));
        assert!(
            found.iter().any(|entry| entry.starts_with("checkpoint-")),
            "{name}: {found:?}"
        );
    }
    bench.train("stopped", &changes).expect(0);
    for name in ["a", "b"] {
        let [whole, stopped] = ["whole", "stopped"].map(|run| bench.path(run).join(name));
        let error = apart(&stopped, &whole);
        assert!(error < 1e-6, "{name}: {error}");
    }
}

#[test]
fn one_that_fails_is_named_and_the_others_have_their_results() {
    let bench = Workbench::new(8);
    let adapters = json!([
        {"name": "wild", "learning_rate": 1e38, "max_grad_norm": 0},
        {"name": "tame"},
    ]);
    let run = bench.train("out", &json!({"adapters": adapters, "max_steps": 6}));
    let run = run.expect(70);
    assert!(
        run.stderr.contains("adapter `wild` failed"),
        "{}",
        run.stderr
    );
    assert!(bench.path("out/tame/adapter_model.safetensors").is_file());
    let report = read_json(&bench.path("out/adapters.json"));
    assert!(report["adapters"][0]["error"].is_string(), "{report}");
    assert_eq!(report["adapters"][1]["steps"], 6);
}

#[test]
fn mistakes_are_named_before_anything_is_written() {
    let bench = Workbench::new(8);
    let two = |own: Value| json!({"adapters": [{"name": "a"}, with(&json!({"name": "b"}), &own)]});
    for (changes, parts) in [
        (
            two(json!({"lora_target_modules": ["embed_tokens"]})),
            ["embed_tokens", "adapters"],
        ),
        (
            two(json!({"init_lora_weights": "pissa"})),
            ["`init_lora_weights`", "`b`"],
        ),
        (
            two(json!({"lora_target_modules": ["q_prog"]})),
            ["q_proj", "`b`"],
        ),
        (
            two(json!({"model_name_or_path": "x"})),
            ["`model_name_or_path`", "beside `adapters`"],
        ),
        (
            two(json!({"dataset_name": "nowhere.jsonl"})),
            ["nowhere.jsonl", ""],
        ),
        (
            json!({"adapters": [{"name": "a"}], "use_peft": false}),
            ["`use_peft`", "share"],
        ),
        (
            json!({"adapters": [{"name": "a"}], "deterministic_reduction": true}),
            ["`deterministic_reduction`", "adapters"],
        ),
        (
            json!({"adapters": [{"name": "a"}], "neftune_noise_alpha": 5}),
            ["`neftune_noise_alpha`", "adapters"],
        ),
    ] {
        let run = bench.train("bad", &changes);
        assert!(
            [65, 78].contains(&run.code.unwrap_or(0)),
            "{changes}: {run:?}"
        );
        assert!(
            parts.iter().all(|part| run.stderr.contains(part)),
            "{changes}: {}",
            run.stderr
        );
        assert_eq!(entries(&bench.path("bad")), [""; 0], "{changes}");
    }
    let config = bench.config("bad", &json!({}));
    for (words, code, part) in [
        (&["--sweep"][..], 2, "lora_r=8,16"),
        (&["--sweep", "lorar=2,4"], 78, "lora_r"),
        (&["--sweep", "lora_r=2,x"], 78, "lora_r"),
        (&["--sweep", "dtype=float32,bfloat16"], 78, "same for all"),
    ] {
        let run = ferrotune(&[&["train", text(&config)], words].concat()).expect(code);
        assert!(run.stderr.contains(part), "{words:?}: {}", run.stderr);
    }
}
