//! `ferrotune env`: the environment of the process, and files of recorded ones.

mod common;

use common::{command, ferrotune, text};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;

fn fixture(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/fixtures/launch").join(name)
}

/// `ferrotune env` with these variables and no others.
fn env(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let arguments: Vec<&str> = ["env"].iter().chain(arguments).copied().collect();
    let mut command = command(&arguments);
    command.env_clear().envs(variables.iter().copied());
    command.output().expect("the binary starts")
}

#[test]
fn recorded_environments_pass_through_the_command_line() {
    let (launchers, rules) = (fixture("launchers.json"), fixture("rules.json"));
    let checked = ferrotune(&["env", "--check", text(&launchers), text(&rules)]).expect(0);
    let last = checked.stdout.lines().last().expect("a line");
    assert_eq!(last, "200 passed, 0 failed");
}

#[test]
fn a_wrong_expectation_fails_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("cases.json");
    let cases = r#"[{"name": "right", "env": {}, "host": {"gpus": 2}, "expect": {"world_size": 2}},
        {"name": "wrong", "env": {}, "host": {"gpus": 2}, "expect": {"world_size": 3}},
        {"name": "no such field", "env": {}, "expect": {"worlds": 1}},
        {"name": "no error", "env": {}, "expect": {"error": "E_RANGE"}}]"#;
    std::fs::write(&file, cases).expect("writable");
    let checked = ferrotune(&["env", "--check", text(&file)]).expect(70);
    let lines: Vec<&str> = checked.stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert_eq!(lines[0], "FAILED wrong: world_size: expected 3, found 2");
    assert!(lines[1].contains("no field has this name"), "{}", lines[1]);
    assert_eq!(lines[3], "1 passed, 3 failed");
}

#[test]
fn a_file_that_is_none_is_bad_input() {
    ferrotune(&["env", "--check", "no-such-file.json"]).expect(65);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("cases.json");
    for (content, problem) in [
        ("{}", "a list of cases"),
        ("[{\"name\": \"a\"}]", "case a:"),
    ] {
        std::fs::write(&file, content).expect("writable");
        let checked = ferrotune(&["env", "--check", text(&file)]).expect(65);
        assert!(checked.stderr.contains(problem), "{}", checked.stderr);
    }
}

#[test]
fn the_environment_of_the_process_is_read() {
    let variables = [
        ("OMPI_COMM_WORLD_RANK", "3"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("MASTER_ADDR", "n0"),
    ];
    let output = env(&["--json", "--device", "cpu"], &variables);
    assert_eq!(output.status.code(), Some(0));
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(found["launcher"], "openmpi");
    assert_eq!(found["ranks"], serde_json::json!([3]));
    assert_eq!(found["sources"]["master_addr"], "MASTER_ADDR=n0");
    let output = env(&["--device", "cpu"], &variables);
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        words.contains("openmpi") && words.contains("OMPI_COMM_WORLD_SIZE=4"),
        "{words}"
    );
}

#[test]
fn an_environment_that_cannot_be_believed_ends_with_78() {
    let variables = [
        ("PET_NNODES", "2"),
        ("PET_NODE_RANK", ""),
        ("PET_MASTER_ADDR", "a"),
    ];
    let output = env(&["--json"], &variables);
    assert_eq!(output.status.code(), Some(78));
    let error: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(error["error"], "E_NOT_INT");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    for part in [
        "E_NOT_INT",
        "PET_NODE_RANK=\"\"",
        "trainjob-torch",
        "expected",
        "fix: ",
    ] {
        assert!(words.contains(part), "{part}: {words}");
    }
}

#[test]
fn the_token_is_never_shown() {
    let variables = [
        ("FERROTUNE_RANK", "0"),
        ("FERROTUNE_WORLD_SIZE", "1"),
        ("FERROTUNE_LOCAL_RANK", "0"),
        ("FERROTUNE_MASTER_ADDR", "127.0.0.1"),
        ("FERROTUNE_TOKEN", "secret-4711"),
    ];
    for arguments in [&["--json"][..], &[]] {
        let output = env(arguments, &variables);
        assert_eq!(output.status.code(), Some(0));
        let words = [output.stdout, output.stderr].concat();
        assert!(!String::from_utf8_lossy(&words).contains("4711"));
    }
    // Nor where it is refused.
    let mut unexpanded = variables;
    unexpanded[4].1 = "$(secret)-4711";
    for arguments in [&["--json"][..], &[]] {
        let output = env(arguments, &unexpanded);
        assert_eq!(output.status.code(), Some(78));
        let words = [output.stdout, output.stderr].concat();
        let words = String::from_utf8_lossy(&words);
        assert!(
            words.contains("FERROTUNE_TOKEN") && !words.contains("4711"),
            "{words}"
        );
    }
}
