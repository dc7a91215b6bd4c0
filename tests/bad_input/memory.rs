//! What happens where memory is limited: `ulimit -v`, whatever the machine has.

use super::common::{Finished, Workbench, command, text, write_rows};
use serde_json::json;
use std::process::Command;

const DOES_NOT_FIT: i32 = 71;

/// A run of the binary, by one thread, that may map `kib` of memory.
fn limited(kib: u64, arguments: &[&str]) -> Finished {
    let limit = format!("ulimit -v {kib} && exec \"$0\" \"$@\"");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &limit])
        .arg(command(&[]).get_program())
        .args(arguments)
        .env_remove("RUST_LOG")
        .env("RAYON_NUM_THREADS", "1");
    shell.output().expect("there is a shell").into()
}

#[test]
fn a_run_beyond_the_limit_of_its_process_is_told_what_would_fit() {
    let bench = Workbench::new(0);
    write_rows(
        &bench.path("rows.jsonl"),
        &vec![json!({"text": "a".repeat(250)}); 4000],
    );
    let config = bench.config("out", &json!({"per_device_train_batch_size": 4000}));
    let plan = ["plan", text(&config)];
    // Of 2 to 4 GiB, which the limit has not.
    let finished = limited(1 << 20, &plan).expect(DOES_NOT_FIT);
    for part in ["does not fit", "available", "per_device_train_batch_size: "] {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
    limited(
        1 << 20,
        &[&plan[..], &["--per_device_train_batch_size", "8"]].concat(),
    )
    .expect(0);
}

#[test]
fn an_allocation_that_fails_ends_with_a_message_and_its_own_code() {
    // The embedding alone takes 1 GiB.
    let bench = ["bench", "--shape", "1B", "--threads", "1"];
    let finished = limited(900_000, &bench).expect(DOES_NOT_FIT);
    for part in ["error: does not fit", "bytes", "ulimit -v"] {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
}
