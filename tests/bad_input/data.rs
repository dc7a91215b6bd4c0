//! Rows.

use super::common::{Workbench, ferrotune, read_json, text};
use super::{BAD_CONFIG, BAD_INPUT, check, fault, untouched};
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
        fault(
            "a token beyond the vocabulary in line 2",
            json!({}),
            |bench| {
                let rows: [&[u8]; 2] = [
                    br#"{"input_ids": [1, 2]}"#,
                    br#"{"input_ids": [1, 999999]}"#,
                ];
                write_lines(bench, &rows);
            },
            BAD_INPUT,
            &["rows.jsonl:2", "999999", "the vocabulary has"],
        ),
        fault(
            "rows from a device",
            json!({"train_file": "/dev/zero"}),
            untouched,
            BAD_INPUT,
            &["/dev/zero", "write them to a file"],
        ),
        fault(
            "a directory as a template",
            json!({"chat_template_path": "/"}),
            untouched,
            BAD_CONFIG,
            &["chat_template_path", "`/` is a directory"],
        ),
        fault(
            "an endless template",
            json!({"chat_template_path": "/dev/zero"}),
            untouched,
            BAD_INPUT,
            &["/dev/zero", "the template has more than 1048576 bytes"],
        ),
    ]);
}

#[test]
fn inspect_refuses_what_a_run_refuses() {
    for (changes, code, parts) in [
        (
            json!({"dataset_columns": {"qestion": "prompt"}}),
            BAD_CONFIG,
            ["dataset_columns", "did you mean `question`?"],
        ),
        (
            json!({"pad_token": "<|im_ends|>"}),
            BAD_CONFIG,
            ["pad_token", "did you mean `<|im_end|>`?"],
        ),
        (
            json!({"eos_token": "<|eot|>"}),
            BAD_CONFIG,
            ["eos_token", "is not a token of the vocabulary"],
        ),
        (
            json!({"max_length": null}),
            BAD_CONFIG,
            ["max_length", "set max_length: 256"],
        ),
        (
            json!({"eval_file": "none.jsonl", "eval_strategy": "epoch"}),
            BAD_INPUT,
            ["none.jsonl", "cannot read"],
        ),
    ] {
        let bench = Workbench::new(4);
        let long = format!(r#"{{"text": "{}", "question": 1}}"#, "a".repeat(300));
        write_lines(&bench, &[long.as_bytes()]);
        let config = bench.config("out", &changes);
        let run = ferrotune(&["train", text(&config)]).expect(code).stderr;
        let seen = ferrotune(&["inspect", "data", text(&config)]).expect(code);
        assert_eq!(seen.stderr, run);
        assert!(parts.iter().all(|part| run.contains(part)), "{run}");
    }
}

#[test]
fn columns_that_nothing_reads_are_named_once_for_each_file() {
    let bench = Workbench::new(4);
    let turns =
        json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]);
    let row = json!({"id": 7, "system": "Be brief.", "conversations": turns, "extra": null});
    let row = row.to_string();
    write_lines(&bench, &[row.as_bytes(), row.as_bytes()]);
    let config = bench.config("out", &json!({"per_device_train_batch_size": 1}));
    let path = bench.path("rows.jsonl");
    let line = format!(
        "{}: not used: `conversations[].weight`, `id`, `system`",
        path.display()
    );
    let seen = ferrotune(&["inspect", "data", text(&config)])
        .expect(0)
        .stdout;
    assert_eq!(seen.matches(&line).count(), 1, "{seen}");
    let run = ferrotune(&["train", text(&config)]).expect(0).stderr;
    assert_eq!(run.matches(&line).count(), 1, "{run}");
    let seen = ferrotune(&["plan", text(&config), "--overwrite_output_dir"]).expect(0);
    let plan: serde_json::Value = serde_json::from_str(&seen.stdout).expect("one document");
    let names = json!(["conversations[].weight", "id", "system"]);
    assert_eq!(plan["preflight"]["unused_columns"][text(&path)], names);
}

#[test]
fn a_mask_of_completions_counts_where_they_are_to_be_trained_alone() {
    let bench = Workbench::new(4);
    let row: &[u8] = br#"{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}"#;
    write_lines(&bench, &[row]);
    for (only, trained) in [(json!(null), 3), (json!(true), 2), (json!(false), 3)] {
        let config = bench.config("out", &json!({"completion_only_loss": only}));
        let seen = ferrotune(&["inspect", "data", text(&config), "--json"]).expect(0);
        let seen: serde_json::Value = serde_json::from_str(&seen.stdout).expect("one document");
        assert_eq!(seen["trained_tokens"], trained, "{only}");
        let said = ferrotune(&["inspect", "data", text(&config)]).expect(0);
        let named = [said.stdout, said.stderr].concat();
        let named = named.contains("not used: `completion_mask`");
        assert_eq!(named, trained == 3, "{only}");
    }
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

#[test]
fn a_step_of_rows_that_train_nothing_changes_nothing() {
    let bench = Workbench::new(4);
    // Rows of one token, as TRL has them; nothing comes before it to predict it from.
    let one: &[u8] = br#"{"input_ids": [5]}"#;
    write_lines(&bench, &[one, br#"{"input_ids": [5, 6, 7]}"#, one]);
    let changes = json!({"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential",
                         "max_steps": 3});
    bench.train("out", &changes).expect(0);
    let state = read_json(&bench.path("out/trainer_state.json"));
    let losses = state["log_history"].as_array().expect("a list").iter();
    let losses: Vec<f64> = losses.filter_map(|row| row["loss"].as_f64()).collect();
    assert!(
        losses[0] == 0.0 && losses[1] > 0.0 && losses[2] == 0.0,
        "{losses:?}"
    );
}

#[test]
fn bad_rows_are_skipped_where_asked_and_inspect_names_them() {
    let bench = Workbench::new(4);
    let good: &[u8] = br#"{"prompt": "what is it? ", "completion": "an answer"}"#;
    write_lines(&bench, &[good, b"{broken", good]);
    let changes = json!({"bad_rows": "skip", "per_device_train_batch_size": 1});
    let config = bench.config("out", &changes);
    let seen = ferrotune(&["inspect", "data", "--rows", "1", text(&config)]).expect(0);
    let (begin, end) = (seen.stdout.find('\u{27e6}'), seen.stdout.find('\u{27e7}'));
    let (begin, end) = (begin.expect("a mark"), end.expect("a mark"));
    assert!(
        seen.stdout[..begin].contains("what is it?"),
        "{}",
        seen.stdout
    );
    assert!(
        seen.stdout[begin..end].contains("answer"),
        "{}",
        seen.stdout
    );
    assert!(
        seen.stdout.contains("1 that cannot be used"),
        "{}",
        seen.stdout
    );
    assert!(
        seen.stdout.contains("rows.jsonl:2: not valid JSON"),
        "{}",
        seen.stdout
    );
    let json = ferrotune(&["inspect", "data", text(&config), "--json"]).expect(0);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("one document");
    assert_eq!((&json["bad_rows"], &json["rows"]), (&json!(1), &json!(3)));
    ferrotune(&["inspect", "data", "--first", "9", text(&config)]).expect(2);
    ferrotune(&["inspect", "data", text(&config), "--first", "9"]).expect(2);
    ferrotune(&["inspect", "data", text(&config), "--rows", "few"]).expect(2);
    ferrotune(&["inspect", "data", text(&config), "--rows", "1"]).expect(0);
    bench.train("out", &changes).expect(0);
}

#[test]
fn compressed_rows_and_rows_held_out_train() {
    let bench = Workbench::new(4);
    let rows: String = (0..40)
        .map(|i| format!("{{\"question\": \"{i}? \", \"answer\": \"{i}!\"}}\n"))
        .collect();
    // One stored block: what gzip makes of rows that it does not compress.
    let mut gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x01".to_vec();
    let length = u16::try_from(rows.len()).expect("a small file");
    gzip.extend(length.to_le_bytes());
    gzip.extend((!length).to_le_bytes());
    gzip.extend(rows.as_bytes());
    gzip.extend(crc32(rows.as_bytes()).to_le_bytes());
    gzip.extend(u32::from(length).to_le_bytes());
    std::fs::write(bench.path("rows.jsonl"), gzip).expect("writable");
    let changes = json!({
        "dataset_columns": {"question": "prompt", "answer": "completion"},
        "test_split_size": 0.3,
        "eval_strategy": "epoch",
        "label_smoothing_factor": 0.1,
        "loraplus_lr_ratio": 4,
    });
    bench.train("out", &changes).expect(0);
    let results = read_json(&bench.path("out/eval_results.json"));
    assert!(
        results["eval_loss"].as_f64().is_some_and(f64::is_finite),
        "{results}"
    );
    // A run that evaluates nothing leaves no evaluation of the run before.
    let mut changes = changes;
    changes["eval_strategy"] = json!("no");
    changes["overwrite_output_dir"] = json!(true);
    bench.train("out", &changes).expect(0);
    assert!(bench.path("out/run.json").is_file());
    assert!(!bench.path("out/eval_results.json").exists());
}

/// The checksum of gzip, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
