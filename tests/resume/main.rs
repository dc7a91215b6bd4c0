//! A run that was stopped and resumed is the run that was not, to the last bit.
#![cfg(unix)]

mod best;
#[path = "../common/mod.rs"]
mod common;
mod refusals;
mod signals;

use common::{
    Shape, Stored, Workbench, copy_dir, entries, read, read_json, text, write_json, write_model,
};
use ferrotune::core::checkpoint::Checkpoint;
use ferrotune::core::io::{FileDType, SafetensorsFile};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const STEPS: u64 = 12;
/// What a clock measured, and a path of the output directory.
const NOT_COMPARED: [&str; 3] = ["runtime", "per_second", "best_model_checkpoint"];

/// Everything that a resume could get wrong: dropout, noise on embeddings, accumulation, several epochs, warmup, decay of
/// the learning rate and of weights, evaluation, a log row that spans the checkpoint.
fn changes(bench: &Workbench) -> Value {
    json!({
        "eval_file": bench.path("rows.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 4,
        "lora_dropout": 0.2,
        "neftune_noise_alpha": 5,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "logging_steps": 5,
        "save_strategy": "steps",
        "save_steps": 1,
        "resume_from_checkpoint": "auto",
    })
}

fn with(bench: &Workbench, more: &Value) -> Value {
    let mut all = changes(bench);
    let more = more.as_object().expect("an object").clone();
    all.as_object_mut().expect("an object").extend(more);
    all
}

/// A bench with an uninterrupted run in `whole`.
fn uninterrupted() -> Workbench {
    let bench = Workbench::new(19);
    bench.train("whole", &changes(&bench)).expect(0);
    bench
}

/// As if the run `whole` had been killed right after its checkpoint of `step`.
fn killed_after(bench: &Workbench, name: &str, step: u64) -> PathBuf {
    let (from, to) = (bench.path("whole"), bench.path(name));
    for done in 1..=step {
        let checkpoint = format!("checkpoint-{done}");
        copy_dir(&from.join(&checkpoint), &to.join(&checkpoint));
    }
    std::fs::copy(from.join("trainer_log.jsonl"), to.join("trainer_log.jsonl")).expect("copied");
    to
}

fn comparable(mut value: Value) -> Value {
    match &mut value {
        Value::Object(map) => {
            map.retain(|key, _| !NOT_COMPARED.iter().any(|end| key.ends_with(end)));
            map.values_mut().for_each(|v| *v = comparable(v.take()));
        }
        Value::Array(list) => list.iter_mut().for_each(|v| *v = comparable(v.take())),
        _ => {}
    }
    value
}

/// Weights, moments and history of the two runs are the same.
#[track_caller]
fn assert_same_result(whole: &Path, resumed: &Path) {
    let last = format!("checkpoint-{STEPS}");
    let files = [
        "adapter_model.safetensors".to_owned(),
        format!("{last}/adapter_model.safetensors"),
        format!("{last}/optimizer.safetensors"),
    ];
    for file in &files {
        assert!(
            read(&whole.join(file)) == read(&resumed.join(file)),
            "{file} differs after a resume"
        );
    }
    for file in ["trainer_state.json", &format!("{last}/trainer_state.json")] {
        let history = |run: &Path| comparable(read_json(&run.join(file)));
        assert_eq!(history(whole), history(resumed), "{file}");
    }
}

fn checkpoints(output: &Path) -> Vec<String> {
    let names = entries(output).into_iter();
    names.filter(|n| n.starts_with("checkpoint-")).collect()
}

#[test]
fn a_resumed_run_equals_the_uninterrupted_one_at_every_place() {
    let bench = uninterrupted();
    for step in [1, 4, 7] {
        let name = format!("killed_after_{step}");
        let output = killed_after(&bench, &name, step);
        let finished = bench.train(&name, &changes(&bench)).expect(0);
        let first = format!("\"first_step\":{step},");
        assert!(finished.stdout.contains(&first), "{}", finished.stdout);
        assert_same_result(&bench.path("whole"), &output);
        let rows = |run: &Path| -> Vec<Value> {
            let text = String::from_utf8(read(&run.join("trainer_log.jsonl"))).expect("UTF-8");
            let row = |line: &str| serde_json::from_str::<Value>(line).expect("JSON");
            text.lines().map(row).collect()
        };
        let steps = |run: &Path| -> Vec<Value> {
            rows(run)
                .iter()
                .map(|r| r["current_steps"].clone())
                .collect()
        };
        assert_eq!(
            steps(&bench.path("whole")),
            steps(&output),
            "trainer_log.jsonl"
        );
    }
}

#[test]
fn a_resumed_run_equals_the_uninterrupted_one_with_other_optimizers() {
    for optim in ["adamw_8bit", "adafactor", "lion_8bit", "muon"] {
        let bench = Workbench::new(19);
        // A table of 256 x 32 is large enough for moments in bytes.
        let shape = Shape {
            vocab: 256,
            ..Shape::default()
        };
        write_model(&bench.path("base"), &shape, Stored::F32, 1);
        let changes = with(
            &bench,
            &json!({"optim": optim, "lora_modules_to_save": ["lm_head"], "learning_rate": 1e-3}),
        );
        bench.train("whole", &changes).expect(0);
        let output = killed_after(&bench, "killed", 5);
        bench.train("killed", &changes).expect(0);
        assert_same_result(&bench.path("whole"), &output);
        let state = SafetensorsFile::open(output.join("checkpoint-5/optimizer.safetensors"));
        let state = state.expect("sound");
        let in_bytes = state
            .names()
            .any(|name| state.meta(name).is_some_and(|m| m.dtype == FileDType::U8));
        assert_eq!(in_bytes, optim.ends_with("8bit"), "{optim}");
    }
}

#[test]
fn a_resume_from_a_path_starts_at_that_checkpoint() {
    let bench = uninterrupted();
    let from = bench.path("whole").join("checkpoint-4");
    let changes = with(&bench, &json!({"resume_from_checkpoint": from}));
    bench.train("elsewhere", &changes).expect(0);
    assert_same_result(&bench.path("whole"), &bench.path("elsewhere"));
    assert_eq!(
        checkpoints(&bench.path("elsewhere")).len(),
        STEPS as usize - 4
    );
}

#[test]
fn a_resume_of_a_finished_run_trains_nothing_and_keeps_its_result() {
    let bench = uninterrupted();
    let files = [
        "adapter_model.safetensors",
        "train_results.json",
        "all_results.json",
        "trainer_state.json",
        "trainer_log.jsonl",
        "README.md",
        "run.json",
    ];
    let all = || files.map(|name| read(&bench.path("whole").join(name)));
    let before = all();
    let finished = bench.train("whole", &changes(&bench)).expect(0);
    assert!(
        finished.stderr.contains("already finished"),
        "{}",
        finished.stderr
    );
    assert!(all() == before, "a result was written again");
    // A run killed after its last checkpoint has no result yet: it is written now.
    let killed = killed_after(&bench, "killed", STEPS);
    bench.train("killed", &changes(&bench)).expect(0);
    assert_same_result(&bench.path("whole"), &killed);
}

#[test]
fn full_fine_tuning_resumes_to_the_same_weights() {
    let bench = Workbench::new(19);
    let changes = with(&bench, &json!({"use_peft": false, "learning_rate": 1e-3}));
    bench.train("whole", &changes).expect(0);
    let output = killed_after(&bench, "killed", 5);
    bench.train("killed", &changes).expect(0);
    for file in ["model.safetensors", "checkpoint-12/optimizer.safetensors"] {
        let (a, b) = (bench.path("whole").join(file), output.join(file));
        assert!(read(&a) == read(&b), "{file} differs after a resume");
    }
}

#[test]
fn save_total_limit_keeps_the_newest() {
    let bench = Workbench::new(8);
    let changes = with(&bench, &json!({"save_total_limit": 2}));
    bench.train("few", &changes).expect(0);
    assert_eq!(
        checkpoints(&bench.path("few")),
        ["checkpoint-11", "checkpoint-12"]
    );
    // The manifest of a checkpoint covers what it lists: a changed state file is found out too.
    let state = bench.path("few/checkpoint-12/trainer_state.json");
    write_json(&state, &json!({"global_step": 99}));
    assert!(Checkpoint::verify(&bench.path("few/checkpoint-12")).is_err());
}

#[test]
fn starting_over_takes_the_old_checkpoints_away_and_keeps_the_new_ones() {
    let bench = uninterrupted();
    let shorter = json!({
        "resume_from_checkpoint": null, "overwrite_output_dir": true, "max_steps": 3,
        "save_total_limit": 2,
    });
    // A run that is refused takes nothing away.
    let mut refused = with(&bench, &shorter);
    refused["lora_target_modules"] = json!(["no_such_layer"]);
    bench.train("whole", &refused).expect(78);
    assert_eq!(checkpoints(&bench.path("whole")).len(), STEPS as usize);
    bench.train("whole", &with(&bench, &shorter)).expect(0);
    assert_eq!(
        checkpoints(&bench.path("whole")),
        ["checkpoint-2", "checkpoint-3"]
    );
}

#[test]
fn base_and_data_may_lie_elsewhere_when_a_run_goes_on() {
    let bench = uninterrupted();
    let output = killed_after(&bench, "moved", 4);
    copy_dir(&bench.path("base"), &bench.path("mount/base"));
    let rows = bench.path("mount/rows.jsonl");
    std::fs::copy(bench.path("rows.jsonl"), &rows).expect("copied");
    let paths = json!({
        "model_name_or_path": bench.path("mount/base"), "dataset_name": null, "train_file": rows,
        "eval_file": rows,
    });
    bench.train("moved", &with(&bench, &paths)).expect(0);
    assert_same_result(&bench.path("whole"), &output);
}

#[test]
fn the_best_checkpoint_is_named_in_every_checkpoint_from_itself_on() {
    let bench = uninterrupted();
    let whole = bench.path("whole");
    for step in 1..=STEPS {
        let state = read_json(&whole.join(format!("checkpoint-{step}/trainer_state.json")));
        let named = &state["best_model_checkpoint"];
        let Some(best) = state["best_global_step"].as_u64() else {
            assert!(step < 4 && named.is_null(), "step {step}: {named}");
            continue;
        };
        let expected = whole.join(format!("checkpoint-{best}"));
        assert_eq!(named, text(&expected), "step {step}");
    }
}
