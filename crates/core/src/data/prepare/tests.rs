use super::{PrepareOptions, Preparer, Row, TruncationMode};
use crate::data::batch::{Example, IGNORE_INDEX};
use crate::data::fixtures::{read_json, report, repository, roots};
use crate::data::record::{Record, RecordKind};
use crate::data::{Dataset, SpecialTokens, Tokenizer, pack_bfd};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_dir(&repository().join("tokenizers").join(name)).expect("the tokenizer loads")
}

fn rows(examples: &Value) -> Vec<Row> {
    let path: Arc<Path> = Arc::from(Path::new("rows.jsonl"));
    let rows = examples.as_array().into_iter().flatten().enumerate();
    rows.map(|(i, example)| Row {
        record: Record::from_row(example.as_object().expect("a row is an object"), "text")
            .expect("the row is well formed"),
        path: path.clone(),
        line: i as u64 + 1,
        label: None,
    })
    .collect()
}

fn options(config: &Value) -> PrepareOptions {
    PrepareOptions {
        max_length: match config.get("max_length") {
            None => Some(1024),
            Some(length) => length.as_u64().map(|n| n as usize),
        },
        truncation_mode: match config["truncation_mode"].as_str() {
            Some("keep_end") => TruncationMode::KeepEnd,
            _ => TruncationMode::KeepStart,
        },
        completion_only_loss: config["completion_only_loss"].as_bool(),
        assistant_only_loss: config["assistant_only_loss"] == true,
        keep_unlabelled: config["packing"] == true
            || config.get("max_length").is_some_and(Value::is_null),
        ..PrepareOptions::default()
    }
}

/// What the recorded trainer holds after preparation: examples, or packed rows.
fn expected(case: &Value) -> Vec<Example> {
    let rows = case["prepared"].as_array().into_iter().flatten();
    rows.map(|row| Example {
        input_ids: serde_json::from_value(row["input_ids"].clone()).expect("ids are numbers"),
        labels: serde_json::from_value(row["labels"].clone()).expect("labels are numbers"),
    })
    .collect()
}

fn packed(dataset: &Dataset, max_length: usize) -> Vec<Example> {
    let bins = pack_bfd(&dataset.lengths(), max_length);
    let join = |bin: &Vec<usize>| {
        let mut row = Example::default();
        for &i in bin {
            let example = dataset.examples.get(i).expect("memory is readable");
            row.input_ids.extend(&example.input_ids);
            row.labels.extend(&example.labels);
        }
        row
    };
    bins.iter().map(join).collect()
}

/// What a run would hold of a recorded case: examples, or packed rows.
fn prepared(case: &Value) -> crate::Result<Vec<Example>> {
    let config = &case["config"];
    let name = case["tokenizer"].as_str();
    let name = name.and_then(|name| name.rsplit('/').next());
    let mut tokenizer = tokenizer(name.expect("a case names its tokenizer"));
    if let Some(template) = case["chat_template"].as_str() {
        tokenizer.set_chat_template(template)?;
    }
    let mut options = options(config);
    let wrapped = (config["packing_strategy"] == "wrapped")
        .then(|| options.max_length.take())
        .flatten();
    let dataset = Dataset::from_rows(rows(&case["examples"]), &tokenizer, &options)?;
    match (config["packing"] == true, options.max_length) {
        (true, None) => dataset.examples.wrap(wrapped.unwrap_or(0))?.to_vec(),
        (true, Some(max_length)) => Ok(packed(&dataset, max_length)),
        _ => dataset.examples.to_vec(),
    }
}

/// Prepares the recorded cases of a file, each of which must be as recorded; how many there are.
fn reproduce(path: &Path) -> usize {
    let cases = read_json(path);
    let cases = cases.as_array().expect("a list of cases");
    for case in cases {
        let found = prepared(case).unwrap_or_else(|e| panic!("{}: {e}", case["name"]));
        assert_eq!(found, expected(case), "{}", case["name"]);
    }
    report(&format!("{} preparations match", cases.len()));
    cases.len()
}

#[test]
fn recorded_preparations_are_reproduced() {
    for root in roots("preparation") {
        assert!(reproduce(&root.join("prepare/prepare.json")) >= 17);
    }
}

/// Recorded with TRL 1.16.0: rows of one token, and rows of which no token has a label.
#[test]
fn rows_that_train_nothing_are_kept_where_trl_keeps_them() {
    assert_eq!(reproduce(&repository().join("prepare/kept.json")), 7);
    let rows = rows(&json!([{"text": ""}, {"text": ""}, {"text": "x"}]));
    let tokenizer = tokenizer("bpe_qwen2");
    let dataset = Dataset::from_rows(rows, &tokenizer, &PrepareOptions::default());
    let report = dataset.expect("one row trains a token").report;
    assert_eq!((report.dropped_rows, report.untrained_rows), (0, 2));
}

/// Every recorded rendering, tokenised, and the assistant's tokens where they are recorded.
#[test]
fn tokens_and_assistant_masks_of_renderings_match_transformers() {
    for root in roots("assistant masks") {
        let (mut ids_run, mut masks_run) = (0, 0);
        for folder in crate::data::fixtures::folders(&root.join("chat_templates")) {
            let cases = read_json(&folder.join("cases.json"));
            let name = cases["tokenizer"]
                .as_str()
                .expect("the cases name their tokenizer");
            let mut tokenizer = tokenizer(name.rsplit('/').next().expect("a last part"));
            let source = std::fs::read_to_string(folder.join("template.jinja"));
            tokenizer
                .set_chat_template(&source.expect("the template is readable"))
                .expect("the template compiles");
            let tagged = tokenizer
                .chat_template(None)
                .is_some_and(crate::data::ChatTemplate::has_generation_tags);
            for case in cases["cases"].as_array().into_iter().flatten() {
                let closed = case["kwargs"].get("continue_final_message").is_none()
                    && case["add_generation_prompt"] == false;
                let dated = case["rendered"]
                    .as_str()
                    .is_some_and(|r| r.contains("2026-11-23") || r.contains("23 Nov 2026"));
                if !closed || dated || case.get("input_ids").is_none() {
                    continue;
                }
                let mut variables = case["kwargs"].as_object().cloned().unwrap_or_default();
                let tools = variables.remove("tools").unwrap_or(Value::Null);
                let row = json!([{"messages": case["messages"], "tools": tools,
                                  "chat_template_kwargs": variables}]);
                let row = rows(&row).remove(0);
                let options = PrepareOptions {
                    assistant_only_loss: tagged,
                    ..PrepareOptions::default()
                };
                let preparer = Preparer::new(&tokenizer, &options, RecordKind::Messages)
                    .expect("the options apply");
                let example = preparer.prepare(&row).expect("the row can be prepared");
                let ids: Vec<u32> =
                    serde_json::from_value(case["input_ids"].clone()).expect("numbers");
                assert_eq!(
                    example.input_ids,
                    ids,
                    "{} {}",
                    folder.display(),
                    case["rendered"]
                );
                ids_run += 1;
                if let (true, Some(mask)) = (tagged, case["assistant_masks"].as_array()) {
                    let found: Vec<u8> = example
                        .labels
                        .iter()
                        .map(|&l| u8::from(l != IGNORE_INDEX))
                        .collect();
                    assert_eq!(json!(found), json!(mask), "{}", case["rendered"]);
                    masks_run += 1;
                }
            }
        }
        report(&format!(
            "{ids_run} token lists and {masks_run} masks match"
        ));
        assert!(ids_run > 40 && masks_run > 20);
    }
}

fn prepare_one(
    tokenizer: &Tokenizer,
    options: &PrepareOptions,
    row: &Value,
) -> Result<Example, String> {
    let row = rows(&json!([row])).remove(0);
    Preparer::new(tokenizer, options, row.record.kind())
        .and_then(|preparer| preparer.prepare(&row))
        .map_err(|e| e.to_string())
}

/// Recorded with `unmask_sample` of InstructLab's training library (fa5b53b): rows whose rendering it leaves
/// as it is, and templates that end an answer with the EOS token.
#[test]
fn what_instructlab_trains_is_trained() {
    let cases = read_json(&repository().join("instructlab/labels.json"));
    let cases = cases.as_array().expect("a list of cases");
    assert_eq!(cases.len(), 13);
    for (i, case) in cases.iter().enumerate() {
        let mut tokenizer = tokenizer(case["tokenizer"].as_str().expect("named"));
        let template = case["template"].as_str().expect("a text");
        tokenizer.set_chat_template(template).expect("it compiles");
        let got = prepare_one(&tokenizer, &PrepareOptions::default(), &case["row"]);
        let recorded = json!([case["input_ids"], case["labels"]]);
        let got = got.map(|example| json!([example.input_ids, example.labels]));
        assert_eq!(got, Ok(recorded), "case {i}");
    }
}

#[test]
fn unmask_needs_a_template_that_writes_what_is_said() {
    let mut chat = tokenizer("bpe_qwen2");
    let row = json!({"unmask": true, "messages": [
        {"role": "user", "content": " hello\n"}, {"role": "assistant", "content": "x"}]});
    let trimming = CHATML.replace("m.content", "m.content | trim");
    chat.set_chat_template(&trimming).expect("it compiles");
    let example = prepare_one(&chat, &PrepareOptions::default(), &row).expect("prepared");
    let trained = example.labels.iter().filter_map(|&l| u32::try_from(l).ok());
    let trained: Vec<u32> = trained.collect();
    let text = chat.decode(&trained, crate::data::Decoding::KeepSpecialTokens);
    assert_eq!(text.ok().as_deref(), Some("hellox<|im_end|>"));
    let upper = CHATML.replace("m.content", "m.content[:3] + m.content");
    chat.set_chat_template(&upper).expect("it compiles");
    let message = prepare_one(&chat, &PrepareOptions::default(), &row).expect_err("refused");
    assert!(
        message.contains("rows.jsonl:1: `unmask` is true"),
        "{message}"
    );
}

#[test]
fn a_token_across_the_boundary_belongs_to_the_completion() {
    let tokenizer = tokenizer("bpe_llama3");
    let options = PrepareOptions::default();
    // "hello world" has the token " w": the prompt's last space is inside it.
    let row = json!({"prompt": "hello ", "completion": "world"});
    let joint = prepare_one(&tokenizer, &options, &row).expect("the row can be prepared");
    assert_eq!(joint.input_ids, [7, 106, 327, 418, 302, 323, 110, 102, 11]);
    assert_eq!(
        joint.labels,
        [-100, -100, -100, -100, 302, 323, 110, 102, 11]
    );
    let row = json!({"prompt": "", "completion": "x"});
    let no_prompt = prepare_one(&tokenizer, &options, &row).expect("the row can be prepared");
    assert_eq!(no_prompt.labels, [-100, 122, 11]);
}

#[test]
fn unusable_options_and_rows_are_refused_with_the_reason() {
    let plain = tokenizer("bpe_llama3");
    let mut chat = tokenizer("bpe_llama3");
    chat.set_chat_template(CHATML)
        .expect("the template compiles");
    let mut rewriting = tokenizer("bpe_llama3");
    rewriting
        .set_chat_template(
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        )
        .expect("the template compiles");
    let mut raising = tokenizer("bpe_llama3");
    raising
        .set_chat_template("{{ raise_exception('no ' + messages[0].role) }}")
        .expect("the template compiles");
    let defaults = PrepareOptions::default();
    let assistant = PrepareOptions {
        assistant_only_loss: true,
        ..PrepareOptions::default()
    };
    let completion = PrepareOptions {
        completion_only_loss: Some(true),
        ..PrepareOptions::default()
    };
    let text = json!({"text": "a"});
    let turn = json!([{"role": "user", "content": "a"}]);
    let messages = json!({"messages": turn});
    let answer = json!({"role": "assistant", "content": "b"});
    let two_turns = json!({"messages": [turn[0], answer, turn[0], answer]});
    let both = json!({"prompt": turn, "completion": turn});
    let table = [
        (&plain, &defaults, &messages, "no chat template"),
        (
            &plain,
            &assistant,
            &text,
            "`assistant_only_loss`: needs conversations",
        ),
        (
            &plain,
            &completion,
            &text,
            "`completion_only_loss`: needs rows with",
        ),
        (
            &rewriting,
            &assistant,
            &two_turns,
            "rows.jsonl:1: the template renders message 1 (counted from 0)",
        ),
        (
            &rewriting,
            &defaults,
            &both,
            "rows.jsonl:1: the template renders the prompt differently",
        ),
        (&raising, &defaults, &messages, "rows.jsonl:1: no user"),
    ];
    for (tokenizer, options, row, expected) in table {
        let message = prepare_one(tokenizer, options, row).expect_err("the row is refused");
        assert!(message.contains(expected), "{message} lacks {expected}");
    }
    let double = json!({"text": "<|begin_of_text|>hello"});
    let message = prepare_one(&plain, &defaults, &double).expect_err("two BOS are refused");
    assert!(
        message.contains("rows.jsonl:1: the row begins with two"),
        "{message}"
    );
}

#[test]
fn an_unknown_role_is_named_and_one_of_the_template_is_not() {
    let messages =
        |role: &str| json!([{"role": "user", "content": "q"}, {"role": role, "content": "hello"}]);
    let knows = CHATML.replace(
        "{{ m.role }}",
        "{{ m.role if m.role != 'critic' else 'judge' }}",
    );
    let whole = PrepareOptions {
        completion_only_loss: Some(false),
        ..PrepareOptions::default()
    };
    for (template, role, expected) in [
        (CHATML, "Assistant", Some("did you mean `assistant`?")),
        (
            CHATML,
            "critic",
            Some("the role `critic`; expected `system`"),
        ),
        (knows.as_str(), "critic", None),
        (CHATML, "tool", None),
    ] {
        let mut chat = tokenizer("bpe_llama3");
        chat.set_chat_template(template).expect("it compiles");
        let turns = messages(role);
        let pair = json!({"prompt": [turns[0]], "completion": [turns[1]]});
        for row in [json!({"messages": turns}), pair] {
            let found = prepare_one(&chat, &whole, &row);
            match (found, expected) {
                (Ok(_), None) => {}
                (Err(message), Some(expected)) => {
                    let place = "rows.jsonl:1: message 1 (counted from 0) has the role";
                    assert!(message.contains(place), "{message}");
                    assert!(message.contains(expected), "{message} lacks {expected}");
                }
                (found, _) => panic!("{role}: {found:?}"),
            }
        }
    }
}

/// TRL trains what follows as many tokens as the prompt has by itself, which is right where these begin
/// the whole. Where a token lies across the end of the prompt it is trained, and TRL's count is off.
#[test]
fn a_prompt_may_end_at_any_character_of_the_text() {
    let texts = [
        "hello world, it's  12345 \u{e9}\u{1f642} x\n\ny",
        " \ta  b ",
        "f(x)=\"\u{4f60}\u{597d}\"//don't",
    ];
    let options = PrepareOptions::default();
    let (mut probes, mut as_trl) = (0, 0);
    for name in [
        "bpe_bytelevel",
        "bpe_llama3",
        "bpe_qwen2",
        "bpe_bytefallback_llama2",
    ] {
        let tokenizer = tokenizer(name);
        let preparer = Preparer::new(&tokenizer, &options, RecordKind::PromptCompletion)
            .expect("the options apply");
        let encode = |text: &str| {
            tokenizer
                .encode(text, SpecialTokens::Add)
                .expect("it encodes")
        };
        for text in texts {
            let ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
            for (prompt, completion) in ends.map(|at| text.split_at(at)) {
                let row = Row {
                    record: Record::PromptCompletion {
                        prompt: prompt.to_owned(),
                        completion: completion.to_owned(),
                    },
                    path: Arc::from(Path::new("rows.jsonl")),
                    line: 1,
                    label: None,
                };
                let example = preparer.prepare(&row).expect("the row can be prepared");
                let case = format!("{name}: {prompt:?} and {completion:?}");
                let eos = tokenizer.eos_token().expect("it has an EOS token");
                let whole = encode(&format!("{text}{eos}"));
                assert_eq!(example.input_ids, whole, "{case}");
                let masked = example
                    .labels
                    .iter()
                    .take_while(|l| **l == IGNORE_INDEX)
                    .count();
                let labels: Vec<i64> = whole[masked..].iter().map(|id| i64::from(*id)).collect();
                let trained: Vec<i64> = example.labels[masked..]
                    .iter()
                    .map(|l| i64::from(*l))
                    .collect();
                assert_eq!(trained, labels, "{case}");
                let alone = encode(prompt);
                probes += 1;
                if whole.starts_with(&alone) {
                    as_trl += 1;
                    assert_eq!(masked, alone.len(), "{case}");
                } else {
                    // The first trained token has something of the completion, and none before it has.
                    let encoded =
                        tokenizer.encode_with_offsets(&format!("{text}{eos}"), SpecialTokens::Add);
                    let offsets = encoded.expect("it encodes").offsets;
                    let beyond: Vec<bool> = offsets.iter().map(|o| o.1 > prompt.len()).collect();
                    assert!(
                        beyond[masked] && !beyond[..masked].contains(&true),
                        "{case}"
                    );
                }
            }
        }
    }
    report(&format!(
        "{as_trl} of {probes} prompts are tokens of the whole"
    ));
    assert!(
        as_trl > probes / 2 && as_trl < probes,
        "{as_trl} of {probes}"
    );
}
