//! A run that was stopped and resumed is the run that was not, to the last bit.
#![cfg(unix)]

mod common;

use common::{
    Finished, Workbench, command, copy_dir, entries, ferrotune, read, read_json, text, write_json,
};
use ferrotune::core::checkpoint::Checkpoint;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const STEPS: u64 = 12;
/// What a clock measured, and a path of the output directory.
const NOT_COMPARED: [&str; 3] = ["runtime", "per_second", "best_model_checkpoint"];

/// Everything that a resume could get wrong: dropout, accumulation, several epochs, warmup, decay of
/// the learning rate and of weights, evaluation, a log row that spans the checkpoint.
fn changes(bench: &Workbench) -> Value {
    json!({
        "eval_file": bench.path("rows.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 4,
        "lora_dropout": 0.2,
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

fn spawn(config: &Path) -> Child {
    command(&["train", text(config)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts")
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args([format!("-{name}"), child.id().to_string()])
        .status();
    assert!(status.expect("kill runs").success());
}

fn finish(child: Child) -> Finished {
    child.wait_with_output().expect("it ends").into()
}

/// Reads standard output up to the first line that is about a finished step.
fn wait_for_step(child: &mut Child) -> BufReader<std::process::ChildStdout> {
    let mut reader = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    while reader.read_line(&mut line).expect("readable") > 0 {
        if line.contains("\"loss\"") {
            return reader;
        }
        line.clear();
    }
    panic!("the run ended before its first step");
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
fn sigterm_saves_one_verified_checkpoint_and_the_resume_is_identical() {
    let bench = Workbench::new(400);
    // Long enough that the signal arrives in the middle.
    let slow = with(
        &bench,
        &json!({
            "save_steps": 1000,
            "logging_steps": 1,
            "per_device_train_batch_size": 48,
            "gradient_accumulation_steps": 2,
        }),
    );
    bench.train("whole", &slow).expect(0);
    for name in ["TERM", "INT"] {
        let config = bench.config(name, &slow);
        let mut child = spawn(&config);
        let mut rest = wait_for_step(&mut child);
        signal(&child, name);
        let mut stdout = String::new();
        rest.read_to_string(&mut stdout).expect("readable");
        finish(child).expect(143);
        let output = bench.path(name);
        let saved = checkpoints(&output);
        assert_eq!(saved.len(), 1, "{saved:?}");
        let checkpoint = Checkpoint::verify(&output.join(&saved[0])).expect("whole");
        assert!(
            (1..STEPS).contains(&checkpoint.step()),
            "{}",
            checkpoint.step()
        );
        assert!(
            !entries(&output).contains(&"adapter_model.safetensors".to_owned()),
            "a stopped run has no result"
        );
        ferrotune(&["train", text(&config)]).expect(0);
        assert_same_result(&bench.path("whole"), &output);
    }
}

#[test]
fn sigterm_before_the_first_step_saves_nothing_and_says_so_with_174() {
    let bench = Workbench::new(8);
    // Preparation waits at this pipe, with the signal handlers in place.
    let pipe = bench.path("template.jinja");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo runs").success());
    let config = bench.config(
        "stopped",
        &with(&bench, &json!({"chat_template_path": pipe})),
    );
    let child = spawn(&config);
    let writer = std::fs::OpenOptions::new().write(true).open(&pipe);
    let mut writer = writer.expect("the other end opens");
    signal(&child, "TERM");
    std::thread::sleep(Duration::from_millis(100));
    let template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    std::io::Write::write_all(&mut writer, template.as_bytes()).expect("written");
    drop(writer);
    finish(child).expect(174);
    assert!(checkpoints(&bench.path("stopped")).is_empty());
    assert!(!bench.path("stopped/adapter_model.safetensors").exists());
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let bench = uninterrupted();
    let config = bench.config("killed", &changes(&bench));
    let mut child = spawn(&config);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !bench.path("killed/checkpoint-2").is_dir() {
        assert!(Instant::now() < deadline, "no checkpoint in time");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("killed");
    child.wait().expect("ended");
    ferrotune(&["train", text(&config)]).expect(0);
    assert_same_result(&bench.path("whole"), &bench.path("killed"));
    let names = entries(&bench.path("killed"));
    assert!(
        !names.iter().any(|n| n.starts_with('.')),
        "leftovers: {names:?}"
    );
}

#[test]
fn a_resume_with_another_learning_rate_is_refused_by_name() {
    let bench = uninterrupted();
    killed_after(&bench, "other", 4);
    let finished = bench
        .train("other", &with(&bench, &json!({"learning_rate": 0.02})))
        .expect(78);
    for part in ["learning_rate", "0.01", "0.02", "output_dir"] {
        assert!(
            finished.stderr.contains(part),
            "{part}: {}",
            finished.stderr
        );
    }
    assert_eq!(
        checkpoints(&bench.path("other")).len(),
        4,
        "nothing was lost"
    );
}

#[test]
fn a_resume_with_other_data_is_refused() {
    let bench = uninterrupted();
    killed_after(&bench, "other", 4);
    let mut rows = common::chat_rows(19);
    rows[3] = json!({"messages": [
        {"role": "user", "content": "other"}, {"role": "assistant", "content": "row"},
    ]});
    common::write_rows(&bench.path("rows.jsonl"), &rows);
    let finished = bench.train("other", &changes(&bench)).expect(78);
    assert!(finished.stderr.contains("data"), "{}", finished.stderr);
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_with_a_warning() {
    let bench = uninterrupted();
    let output = killed_after(&bench, "damaged", 7);
    let path = output.join("checkpoint-7/optimizer.safetensors");
    let mut bytes = read(&path);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).expect("writable");
    let finished = bench.train("damaged", &changes(&bench)).expect(0);
    assert!(
        finished.stderr.contains("checkpoint-7"),
        "no warning: {}",
        finished.stderr
    );
    assert_same_result(&bench.path("whole"), &output);
}

#[test]
fn a_damaged_checkpoint_that_was_asked_for_is_an_error() {
    let bench = uninterrupted();
    let output = killed_after(&bench, "damaged", 2);
    let checkpoint = output.join("checkpoint-2");
    std::fs::write(checkpoint.join("adapter_model.safetensors"), "short").expect("writable");
    let changes = with(&bench, &json!({"resume_from_checkpoint": checkpoint}));
    let finished = bench.train("damaged", &changes).expect(65);
    assert!(
        finished.stderr.contains("adapter_model.safetensors"),
        "{}",
        finished.stderr
    );
}

#[test]
fn true_without_a_checkpoint_is_an_error_and_auto_starts_anew() {
    let bench = Workbench::new(8);
    let finished = bench
        .train(
            "none",
            &with(&bench, &json!({"resume_from_checkpoint": true})),
        )
        .expect(78);
    assert!(
        finished.stderr.contains("resume_from_checkpoint") && finished.stderr.contains("auto"),
        "{}",
        finished.stderr
    );
    bench.train("auto", &changes(&bench)).expect(0);
}

#[test]
fn an_output_directory_with_checkpoints_is_not_overwritten_unasked() {
    let bench = uninterrupted();
    let fresh = with(&bench, &json!({"resume_from_checkpoint": null}));
    let finished = bench.train("whole", &fresh).expect(78);
    for part in ["output_dir", "auto", "overwrite_output_dir"] {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
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
fn a_resume_with_other_weights_of_the_same_shapes_is_refused() {
    let bench = uninterrupted();
    killed_after(&bench, "other", 4);
    common::write_model(
        &bench.path("base"),
        &common::Shape::default(),
        common::Stored::F32,
        8,
    );
    let finished = bench.train("other", &changes(&bench)).expect(78);
    assert!(
        finished.stderr.contains("base_model"),
        "{}",
        finished.stderr
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
