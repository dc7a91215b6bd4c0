//! Runs that a signal ends.

use super::common::{Finished, Workbench, command, entries, ferrotune, read, read_json, text};
use super::{STEPS, assert_same_result, changes, checkpoints, killed_after, uninterrupted, with};
use ferrotune::core::checkpoint::Checkpoint;
use serde_json::json;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

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

/// A run that is sent `name` after its first step.
fn signalled_after_a_step(config: &Path, name: &str) -> Finished {
    let mut child = spawn(config);
    let mut rest = wait_for_step(&mut child);
    signal(&child, name);
    let mut stdout = String::new();
    rest.read_to_string(&mut stdout).expect("readable");
    finish(child)
}

/// Whether these tests, and so the runs that they start, were told to outlive their terminal.
fn hangups_are_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = u64::from_str_radix(mask.expect("there").trim(), 16).expect("a mask");
    // SIGHUP is signal 1.
    mask & 1 == 1
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
            "gradient_accumulation_steps": 12,
        }),
    );
    bench.train("whole", &slow).expect(0);
    for name in ["TERM", "INT", "HUP"] {
        let config = bench.config(name, &slow);
        let output = bench.path(name);
        let finished = signalled_after_a_step(&config, name);
        if name == "HUP" && hangups_are_ignored() {
            // As under `nohup`: the run goes on to its end.
            finished.expect(0);
            assert_same_result(&bench.path("whole"), &output);
            continue;
        }
        finished.expect(143);
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

/// Starts a run whose preparation waits at a pipe for its chat template, with the signal handlers in
/// place; sends it SIGTERM there, then gives it `template`.
fn stopped_while_it_prepares(bench: &Workbench, name: &str, template: &str) -> Finished {
    let pipe = bench.path("template.jinja");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo runs").success());
    let config = bench.config(name, &with(bench, &json!({"chat_template_path": pipe})));
    let child = spawn(&config);
    let writer = std::fs::OpenOptions::new().write(true).open(&pipe);
    let mut writer = writer.expect("the other end opens");
    signal(&child, "TERM");
    std::thread::sleep(Duration::from_millis(100));
    std::io::Write::write_all(&mut writer, template.as_bytes()).expect("written");
    drop(writer);
    finish(child)
}

#[test]
fn sigterm_before_the_first_step_saves_nothing_and_says_so_with_174() {
    let bench = Workbench::new(8);
    let template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    stopped_while_it_prepares(&bench, "stopped", template).expect(174);
    assert!(checkpoints(&bench.path("stopped")).is_empty());
    assert!(!bench.path("stopped/adapter_model.safetensors").exists());
}

#[test]
fn sigterm_before_the_first_step_of_a_resumed_run_leaves_its_checkpoint_as_the_one_saved() {
    let bench = uninterrupted();
    let output = killed_after(&bench, "stopped", 4);
    let before = (
        checkpoints(&output),
        read(&output.join("checkpoint-4/ferrotune.json")),
    );
    // The base's own template, so that the data are the same.
    let tokenizer = read_json(&bench.path("base/tokenizer_config.json"));
    let template = tokenizer["chat_template"].as_str().expect("a template");
    stopped_while_it_prepares(&bench, "stopped", template).expect(143);
    let after = (
        checkpoints(&output),
        read(&output.join("checkpoint-4/ferrotune.json")),
    );
    assert!(before == after, "{after:?}");
    assert!(!output.join("adapter_model.safetensors").exists());
    bench.train("stopped", &changes(&bench)).expect(0);
    assert_same_result(&bench.path("whole"), &output);
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
fn a_command_with_nothing_to_save_leaves_with_174() {
    let bench = Workbench::new(8);
    let pipe = bench.path("prompts.jsonl");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo runs").success());
    // It waits for a writer, which means that it has begun.
    let child = command(&["eval", "--model_name_or_path"])
        .args([text(&bench.path("base")), "--data", text(&pipe)])
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let writer = std::fs::OpenOptions::new().write(true).open(&pipe);
    let _writer = writer.expect("the other end opens");
    signal(&child, "TERM");
    finish(child).expect(174);
}
