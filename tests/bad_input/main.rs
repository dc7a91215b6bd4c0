//! Bad input: the exit code, a message with the place, what was expected and the fix, and nothing
//! half-written.

mod answers;
#[path = "../common/mod.rs"]
mod common;
mod configuration;
mod data;
mod model;
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
