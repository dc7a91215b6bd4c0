//! What `eval` and `generate` refuse.

use super::common::{Finished, Shape, Stored, Workbench, ferrotune, text, write_model};
use super::common::{write_json, write_rows, write_weights};
use super::{BAD_CONFIG, BAD_INPUT, INTERNAL};
use serde_json::json;

const USAGE: i32 = 2;

fn eval(bench: &Workbench, more: &[&str]) -> Finished {
    let (model, rows) = (bench.path("base"), bench.path("rows.jsonl"));
    let place = ["eval", "--data", text(&rows)];
    let model = ["--model_name_or_path", text(&model)];
    ferrotune(&[&place[..], &model, more].concat())
}

fn generate(bench: &Workbench, more: &[&str]) -> Finished {
    let model = bench.path("base");
    let place = ["generate", "--model_name_or_path", text(&model)];
    ferrotune(&[&place[..], more].concat())
}

/// Ends with `code`, says every part, and reports no number.
#[track_caller]
fn refused(finished: Finished, code: i32, says: &[&str]) {
    let finished = finished.expect(code);
    assert_eq!(finished.stdout, "");
    for part in says {
        assert!(
            finished.stderr.contains(part),
            "no `{part}`: {}",
            finished.stderr
        );
    }
}

#[test]
fn an_evaluation_of_nothing_is_refused() {
    let bench = Workbench::new(4);
    refused(
        eval(&bench, &["--limit", "0"]),
        USAGE,
        &["--limit", "1 or more"],
    );
    write_rows(&bench.path("rows.jsonl"), &[]);
    refused(eval(&bench, &[]), BAD_INPUT, &["rows.jsonl", "no rows"]);
    let rows = [
        json!({"prompt": "longer than four", "completion": "x"}),
        json!({"prompt": "a", "completion": "b"}),
    ];
    write_rows(&bench.path("rows.jsonl"), &rows);
    let nothing = ["rows.jsonl", "no token of any of the 1 rows", "max_length"];
    let cut = ["--max_length", "4", "--limit", "1"];
    refused(eval(&bench, &cut), BAD_INPUT, &nothing);
    eval(&bench, &["--max_length", "4"]).expect(0);
}

#[test]
fn rows_and_prompts_beyond_the_context_are_counted() {
    let bench = Workbench::new(0);
    let row = |length| json!({"prompt": "a".repeat(length), "completion": "b"});
    let rows = [row(300), row(10), row(400), row(200)];
    write_rows(&bench.path("rows.jsonl"), &rows);
    refused(
        eval(&bench, &["--max_length", "1024"]),
        BAD_CONFIG,
        &["max_length", "2 of the 4 rows", "rows.jsonl", "256", "402"],
    );
    // No option makes room for an answer to these.
    refused(
        eval(&bench, &["--exact_match", "--max_new_tokens", "1"]),
        BAD_INPUT,
        &[
            "rows.jsonl:1",
            "300 tokens",
            "256",
            "2 of the 4 prompts",
            "leave it out",
        ],
    );
    write_rows(&bench.path("rows.jsonl"), &[row(10), row(200), row(170)]);
    let ask = |tokens| eval(&bench, &["--exact_match", "--max_new_tokens", tokens]);
    let says = [
        "max_new_tokens",
        "2 of the 3 prompts",
        "rows.jsonl:2",
        "--max-new-tokens 56 or less",
    ];
    refused(ask("100"), BAD_CONFIG, &says);
    refused(ask("57"), BAD_CONFIG, &["1 of the 3 prompts"]);
    ask("56").expect(0);
}

#[test]
fn prompts_of_a_file_are_named_by_their_line() {
    let bench = Workbench::new(0);
    let file = bench.path("rows.jsonl");
    let ask = |more: &[&str]| {
        let place = ["--prompts_file", text(&file)];
        generate(&bench, &[&place[..], more].concat())
    };
    let row = |length| json!({"prompt": "a".repeat(length)});
    write_rows(&file, &[row(10), row(300)]);
    let says = ["rows.jsonl:2", "300 tokens", "256"];
    refused(ask(&[]), BAD_INPUT, &says);
    write_rows(&file, &[row(10), row(200)]);
    let says = ["rows.jsonl:2", "--max-new-tokens 56 or less"];
    refused(ask(&[]), BAD_CONFIG, &says);
    write_rows(&file, &[row(10), row(0)]);
    refused(ask(&[]), BAD_INPUT, &["rows.jsonl:2", "no tokens"]);
    let long = "a".repeat(300);
    refused(
        generate(&bench, &["--prompt", "a", "--prompt", &long]),
        BAD_CONFIG,
        &["--prompt 2", "256"],
    );

    let template = json!({"chat_template": "{{ raise_exception('no such role') }}"});
    write_json(&bench.path("base/tokenizer_config.json"), &template);
    let chat = json!({"messages": [{"role": "user", "content": "a"}]});
    write_rows(&file, &[row(10), chat]);
    refused(ask(&[]), BAD_INPUT, &["rows.jsonl:2", "no such role"]);
}

#[test]
fn a_prompts_file_without_prompts_is_named() {
    let bench = Workbench::new(0);
    let file = bench.path("rows.jsonl");
    let place = ["--prompts_file", text(&file)];
    let says = ["rows.jsonl", "no prompts", "one JSON object per line"];
    refused(generate(&bench, &place), BAD_INPUT, &says);
    let typed = [&place[..], &["--prompt", "a"]].concat();
    refused(generate(&bench, &typed), BAD_INPUT, &says);
}

#[test]
fn counts_of_nothing_are_usage_errors() {
    let bench = Workbench::new(2);
    for flag in ["--batch_size", "--max_new_tokens"] {
        let named = flag.replace('_', "-");
        let says = [named.as_str(), "1 or more"];
        refused(eval(&bench, &[flag, "0"]), USAGE, &says);
        refused(
            generate(&bench, &["--prompt", "a", flag, "0"]),
            USAGE,
            &says,
        );
    }
    refused(eval(&bench, &["--max_length", "0"]), USAGE, &["1 or more"]);
}

#[test]
fn a_loss_that_is_no_number_is_not_reported() {
    let bench = Workbench::new(4);
    let mut weights = Shape::default().weights(7);
    let norm = weights.get_mut("model.norm.weight").expect("there");
    norm.1[0] = f32::NAN;
    let path = bench.path("base/model.safetensors");
    write_weights(&path, weights.iter(), Stored::F32);
    refused(eval(&bench, &[]), INTERNAL, &["NaN", "weights"]);
}

#[test]
fn a_token_outside_the_vocabulary_names_both_files_and_numbers() {
    let bench = Workbench::new(4);
    let shape = Shape {
        vocab: 40,
        ..Shape::default()
    };
    write_model(&bench.path("base"), &shape, Stored::F32, 1);
    write_rows(&bench.path("rows.jsonl"), &[json!({"text": "1z"})]);
    let (tokenizer, config) = (
        bench.path("base/tokenizer.json"),
        bench.path("base/config.json"),
    );
    // z is the last of the 78 tokens.
    let says = [text(&tokenizer), text(&config), "token id 77", "is 40"];
    refused(eval(&bench, &[]), BAD_INPUT, &says);
    let ask = ["--raw", "--prompt", "1z"];
    refused(generate(&bench, &ask), BAD_INPUT, &says);
    generate(&bench, &["--raw", "--prompt", "1"]).expect(0);
}

#[test]
fn a_conversation_for_a_model_without_a_chat_template_is_refused() {
    let bench = Workbench::new(1);
    std::fs::write(bench.path("base/tokenizer_config.json"), "{}").expect("writable");
    let file = bench.path("rows.jsonl");
    let ask = ["--prompts_file", text(&file)];
    let says = ["tokenizer.json", "no chat template"];
    refused(generate(&bench, &ask), BAD_INPUT, &says);
    // What a person types is text then.
    generate(&bench, &["--prompt", "1+1=?", "--max_new_tokens", "2"]).expect(0);
}

#[test]
fn prompts_of_no_known_kind_name_their_line() {
    let bench = Workbench::new(0);
    let rows = [json!({"prompt": "a"}), json!({"question": "a"})];
    write_rows(&bench.path("rows.jsonl"), &rows);
    let file = bench.path("rows.jsonl");
    let says = ["rows.jsonl:2", "`question`", "`prompt` or `messages`"];
    refused(
        generate(&bench, &["--prompts_file", text(&file)]),
        BAD_INPUT,
        &says,
    );
}
