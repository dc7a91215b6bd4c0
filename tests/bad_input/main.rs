//! Bad input: the exit code, a message with the place, what was expected and the fix, and nothing
//! half-written.

mod answers;
#[path = "../common/mod.rs"]
mod common;
mod configuration;
mod data;
mod memory;
mod model;
mod output;
mod weights;

use common::{Workbench, entries, ferrotune, text};
use serde_json::{Value, json};

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
        if bench.path("out").exists() {
            let left = entries(&bench.path("out"));
            complaints.push(format!("left a directory with {left:?}"));
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
fn an_output_directory_that_is_a_file_cannot_be_written() {
    let bench = Workbench::new(4);
    bench.train("out", &json!({})).expect(0);
    let file = bench.path("file");
    std::fs::write(&file, "a file").expect("writable");
    let (base, adapter) = (bench.path("base"), bench.path("out"));
    let train = bench.config("run", &json!({"output_dir": file}));
    for command in [
        vec!["train", text(&train)],
        vec!["train", text(&train), "--resume_from_checkpoint", "auto"],
        vec!["demo", "--output_dir", text(&file)],
        vec![
            "merge",
            "--model_name_or_path",
            text(&base),
            "--adapter",
            text(&adapter),
            "--output_dir",
            text(&file),
        ],
    ] {
        let finished = ferrotune(&command).expect(CANNOT_WRITE);
        for part in ["cannot write", text(&file)] {
            assert!(finished.stderr.contains(part), "{}", finished.stderr);
        }
    }
    assert_eq!(common::read(&file), b"a file");
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
}

#[test]
fn a_configuration_that_is_not_there_is_a_bad_one() {
    for command in ["train", "plan"] {
        let finished = ferrotune(&[command, "/no/such/config.yaml"]).expect(BAD_CONFIG);
        for part in ["/no/such/config.yaml", "cannot be read", "YAML"] {
            assert!(finished.stderr.contains(part), "{}", finished.stderr);
        }
    }
}
