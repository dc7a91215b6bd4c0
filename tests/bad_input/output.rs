//! Standard output that takes nothing more: a full disk is an error, a reader that went away is none.

use super::CANNOT_WRITE;
use super::common::{Finished, Workbench, command, entries, text};
use serde_json::json;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

/// Every command with an answer, on a bench with a trained adapter in `out`.
fn commands(bench: &Workbench) -> Vec<Vec<String>> {
    bench.train("out", &json!({})).expect(0);
    let config = bench.config("again", &json!({}));
    let (base, rows) = (bench.path("base"), bench.path("rows.jsonl"));
    let model = ["--model_name_or_path", text(&base)];
    let (adapter, merged) = (bench.path("out"), bench.path("merged"));
    let case = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/golden/train/schedules"
    );
    [
        vec!["--help"],
        vec!["plan", "none.yaml", "--help"],
        vec!["plan", text(&config)],
        vec!["train", text(&config)],
        vec!["config-schema"],
        vec!["kernels", "--list"],
        vec!["parity", case],
        vec!["bench", "--shape", "tiny", "--config"],
        [&["eval", "--data", text(&rows)], &model[..]].concat(),
        [&["generate", "--prompt", "a"], &model[..]].concat(),
        [
            &["merge", "--adapter", text(&adapter)],
            &model[..],
            &["--output_dir", text(&merged), "--overwrite"],
        ]
        .concat(),
    ]
    .iter()
    .map(|words| words.iter().map(|&w| w.to_owned()).collect())
    .collect()
}

#[test]
fn a_full_disk_under_standard_output_is_an_error_of_writing() {
    let bench = Workbench::new(4);
    for words in commands(&bench) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let full = OpenOptions::new().write(true).open("/dev/full");
        let output = command(&words)
            .stdout(full.expect("Linux has one"))
            .output()
            .expect("the binary starts");
        let finished = Finished::from(output).expect(CANNOT_WRITE);
        assert!(
            finished.stderr.contains("cannot write standard output"),
            "{words:?}: {}",
            finished.stderr
        );
    }
}

#[test]
fn a_reader_that_goes_away_ends_no_command() {
    let bench = Workbench::new(4);
    for words in commands(&bench) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut child = command(&words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        drop((child.stdout.take(), child.stderr.take()));
        let code = child.wait().expect("it ends").code();
        assert_eq!(code, Some(0), "{words:?}");
    }
}

#[test]
fn the_demo_goes_on_when_its_reader_goes_away() {
    let bench = Workbench::new(0);
    let output = bench.path("demo");
    // Steps are JSON lines only where asked for: this is what a person sees.
    let words = ["demo", "--output_dir", text(&output), "--max_steps", "2"];
    let mut child = command(&words)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let mut reader = BufReader::new(child.stdout.take().expect("piped"));
    reader.read_line(&mut String::new()).expect("readable");
    drop(reader);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    let names = entries(&output);
    assert!(
        names.contains(&"adapter_model.safetensors".to_owned()),
        "{names:?}"
    );
}
