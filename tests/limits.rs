//! Limits of the system, and files that are none.
#![cfg(unix)]

mod common;

use common::{Finished, Workbench, entries, ferrotune};
use serde_json::json;
use std::path::Path;

/// `ferrotune train` in a shell that has set a limit first.
fn limited(limit: &str, config: &Path) -> Finished {
    let script = format!("{limit}; exec \"$@\"");
    let output = std::process::Command::new("bash")
        .args([
            "-c",
            &script,
            "bash",
            env!("CARGO_BIN_EXE_ferrotune"),
            "train",
        ])
        .arg(config)
        .env("RAYON_NUM_THREADS", "2")
        .output();
    output.expect("bash runs").into()
}

#[test]
fn a_limit_on_file_sizes_is_an_output_that_cannot_be_written() {
    let bench = Workbench::new(8);
    let config = bench.config("full", &json!({"max_steps": 2}));
    // In units of 1024 bytes: enough for the log, and not for the adapter.
    let finished = limited("ulimit -f 4", &config).expect(73);
    assert!(
        finished.stderr.contains("cannot write"),
        "{}",
        finished.stderr
    );
    let left: Vec<String> = entries(&bench.path("full"))
        .into_iter()
        .filter(|name| name.ends_with(".tmp"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn threads_that_the_system_does_not_give_are_a_lack_of_memory() {
    let bench = Workbench::new(8);
    let config = bench.config("threads", &json!({"max_steps": 2, "num_threads": 2000}));
    // Stacks of 2 MiB each.
    let finished = limited("ulimit -v 1500000", &config).expect(71);
    // A thread that did start may fail for want of a signal stack before the one that did not is told of.
    let told = ["num_threads", "Cannot allocate memory"];
    assert!(
        told.iter().any(|words| finished.stderr.contains(words)),
        "{}",
        finished.stderr
    );
}

#[test]
fn a_log_that_is_a_link_does_not_lead_elsewhere() {
    let bench = Workbench::new(8);
    let elsewhere = bench.path("elsewhere.txt");
    std::fs::write(&elsewhere, "mine").expect("writable");
    std::fs::create_dir(bench.path("linked")).expect("a directory");
    let log = bench.path("linked/trainer_log.jsonl");
    std::os::unix::fs::symlink(&elsewhere, &log).expect("a link");
    bench.train("linked", &json!({"max_steps": 2})).expect(0);
    assert_eq!(std::fs::read_to_string(&elsewhere).expect("there"), "mine");
    assert!(!log.is_symlink());
}

#[test]
fn what_a_result_cannot_replace_is_found_before_training() {
    let bench = Workbench::new(8);
    let long = json!({"max_steps": 1_000_000});
    std::fs::create_dir_all(bench.path("blocked/adapter_model.safetensors")).expect("a directory");
    let finished = bench.train("blocked", &long).expect(73);
    assert!(
        finished.stderr.contains("is a directory"),
        "{}",
        finished.stderr
    );
    std::fs::create_dir(bench.path("linked")).expect("a directory");
    let checkpoint = bench.path("linked/checkpoint-6");
    std::os::unix::fs::symlink(bench.path("base"), checkpoint).expect("a link");
    let finished = bench.train("linked", &long).expect(73);
    assert!(
        finished.stderr.contains("checkpoint-6"),
        "{}",
        finished.stderr
    );
}

#[test]
fn a_configuration_without_an_end_is_refused() {
    ferrotune(&["plan", "/dev/zero"]).expect(78);
}
