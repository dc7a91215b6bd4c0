//! Rows.

use super::common::{Workbench, read_json};
use super::{BAD_INPUT, check, fault};
use serde_json::json;

fn write_lines(bench: &Workbench, lines: &[&[u8]]) {
    let text: Vec<u8> = lines
        .iter()
        .flat_map(|l| [l, b"\n".as_slice()].concat())
        .collect();
    std::fs::write(bench.path("rows.jsonl"), text).expect("writable");
}

const GOOD: &[u8] = br#"{"text": "good"}"#;

#[test]
fn faults_of_the_rows() {
    check(&[
        fault(
            "broken JSON in line 3",
            json!({}),
            |bench| write_lines(bench, &[GOOD, GOOD, br#"{"text": "bad"#, GOOD]),
            BAD_INPUT,
            &["rows.jsonl:3", "JSON"],
        ),
        fault(
            "invalid UTF-8 in line 2",
            json!({}),
            |bench| write_lines(bench, &[GOOD, b"{\"text\": \"\xff\xfe\"}"]),
            BAD_INPUT,
            &["rows.jsonl:2", "UTF-8"],
        ),
        fault(
            "a list in line 2",
            json!({}),
            |bench| write_lines(bench, &[GOOD, b"[1, 2]"]),
            BAD_INPUT,
            &["rows.jsonl:2", "object"],
        ),
        fault(
            "a row of no known kind",
            json!({}),
            |bench| write_lines(bench, &[br#"{"question": "a", "reply": "b"}"#]),
            BAD_INPUT,
            &["rows.jsonl:1", "messages", "prompt", "text"],
        ),
        fault(
            "a row of another kind in line 2",
            json!({}),
            |bench| write_lines(bench, &[GOOD, br#"{"prompt": "a", "completion": "b"}"#]),
            BAD_INPUT,
            &["rows.jsonl:2", "text"],
        ),
        fault(
            "a message without a role",
            json!({}),
            |bench| write_lines(bench, &[br#"{"messages": [{"from": "user"}]}"#]),
            BAD_INPUT,
            &["rows.jsonl:1", "`role` is missing", "`from`"],
        ),
        fault(
            "no trained token in any row",
            json!({"max_length": 4}),
            |bench| {
                let row: &[u8] = br#"{"prompt": "longer than four", "completion": "x"}"#;
                write_lines(bench, &[row, row]);
            },
            BAD_INPUT,
            &["rows.jsonl", "max_length"],
        ),
        fault(
            "no rows",
            json!({}),
            |bench| write_lines(bench, &[]),
            BAD_INPUT,
            &["rows.jsonl", "no "],
        ),
    ]);
}

#[test]
fn rows_without_a_trained_token_are_dropped_and_counted() {
    let bench = Workbench::new(4);
    let row: &[u8] = br#"{"prompt": "a long prompt without end", "completion": "x"}"#;
    write_lines(&bench, &[row, br#"{"prompt": "a", "completion": "b"}"#]);
    let changes = json!({"max_length": 6, "per_device_train_batch_size": 1});
    bench.train("out", &changes).expect(0);
    let run = read_json(&bench.path("out/run.json"));
    assert_eq!(run["data"]["dropped_rows"], 1, "{run}");
}
