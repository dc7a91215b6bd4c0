//! The demo: what its data must be for its figures to mean something, and the run itself.

mod common;

use common::{Finished, command, ferrotune, text};
use ferrotune::core::data::Tokenizer;
use ferrotune::core::model::DecoderConfig;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo")
}

/// Questions and answers of a file of the demo.
fn rows(name: &str) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(demo().join(name)).expect("committed");
    let content = |row: &Value, key: &str| {
        let content = row[key][0]["content"].as_str();
        content.expect("a message").to_owned()
    };
    text.lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).expect("JSON");
            (content(&row, "prompt"), content(&row, "completion"))
        })
        .collect()
}

/// Letters that differ.
fn distance(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).filter(|(a, b)| a != b).count()
}

fn size(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).expect("readable");
    entries
        .map(|e| e.expect("readable").metadata().expect("readable").len())
        .sum()
}

fn json_lines(finished: &Finished) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).expect("JSON lines alone");
    finished.stdout.lines().map(parse).collect()
}

#[test]
fn test_prompts_are_many_distinct_and_not_trained_on() {
    let (train, test) = (rows("train.jsonl"), rows("test.jsonl"));
    let asked: BTreeSet<&String> = test.iter().map(|(q, _)| q).collect();
    assert!(asked.len() >= 200 && asked.len() == test.len());
    assert!(train.iter().all(|(q, _)| !asked.contains(q)));
}

#[test]
fn every_answer_is_the_word_reversed() {
    for (question, answer) in rows("train.jsonl").iter().chain(&rows("test.jsonl")) {
        let word = question.strip_prefix("reverse: ").expect("one instruction");
        assert_eq!(word.chars().rev().collect::<String>(), *answer);
    }
}

#[test]
fn no_constant_answer_gets_above_5_percent() {
    let mut counts = BTreeMap::new();
    let test = rows("test.jsonl");
    for (_, answer) in &test {
        *counts.entry(answer).or_insert(0) += 1;
    }
    let most = counts.values().max().copied().unwrap_or(0);
    assert!(20 * most <= test.len(), "{most} of {}", test.len());
}

#[test]
fn the_answer_to_the_nearest_training_prompt_is_no_help() {
    let train = rows("train.jsonl");
    let test = rows("test.jsonl");
    let right = |(question, answer): &&(String, String)| {
        let nearest = train.iter().min_by_key(|(q, _)| distance(q, question));
        nearest.is_some_and(|(_, a)| a == answer)
    };
    let right = test.iter().filter(right).count();
    assert!(20 * right < test.len(), "{right} of {}", test.len());
}

#[test]
fn the_base_is_small_and_opens() {
    let base = demo().join("base");
    assert!(size(&base) <= 3 << 20, "{} bytes", size(&base));
    let config = DecoderConfig::open(&base).expect("a Llama");
    let tokenizer = Tokenizer::from_dir(&base).expect("its tokenizer");
    assert!(tokenizer.chat_template(None).is_some());
    assert!(config.max_position_embeddings >= 256);
}

#[test]
fn the_demo_teaches_what_the_base_cannot_do() {
    let place = tempfile::tempdir().expect("a directory");
    // Started elsewhere: nothing of the repository is at hand.
    let finished: Finished = command(&["demo", "--json", "--output_dir", "out"])
        .current_dir(place.path())
        .output()
        .expect("the binary starts")
        .into();
    let lines = json_lines(&finished.expect(0));
    let last = lines.last().expect("a result");
    let share = |key: &str| last[key].as_f64().expect("a number");
    assert_eq!(last["event"], "demo_finished");
    assert!(last["prompts"].as_u64().expect("a count") >= 200);
    assert!(share("exact_match_before") < 0.05, "{last}");
    assert!(share("exact_match_after") >= 0.95, "{last}");

    let (base, adapter) = (place.path().join("out/demo/base"), place.path().join("out"));
    let (base, adapter) = (text(&base), text(&adapter));
    let generate = ["generate", "--json", "--prompt", "reverse: planet"];
    let model = ["--model_name_or_path", base, "--adapter", adapter];
    let answered = ferrotune(&[&generate[..], &model].concat()).expect(0);
    assert_eq!(json_lines(&answered)[0]["answer"], "tenalp");

    let merged = place.path().join("merged");
    let to = ["--output_dir", text(&merged)];
    ferrotune(&[&["merge"][..], &model, &to].concat()).expect(0);
    let model = ["--model_name_or_path", text(&merged)];
    let answered = ferrotune(&[&generate[..], &model].concat()).expect(0);
    assert_eq!(json_lines(&answered)[0]["answer"], "tenalp");
}

#[test]
fn the_shipped_config_trains_from_the_repository() {
    let place = tempfile::tempdir().expect("a directory");
    let output = text(place.path());
    let run = [
        "train",
        "examples/demo/demo.yaml",
        "--output_dir",
        output,
        "--max_steps",
        "3",
        "--save_steps",
        "1",
    ];
    let finished: Finished = command(&run)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("the binary starts")
        .into();
    finished.expect(0);
    assert!(place.path().join("adapter_model.safetensors").is_file());
    assert!(place.path().join("checkpoint-3").is_dir());
}
