//! `eval` and `generate` ask and score rows as training saw them.

mod common;

use common::{Family, Workbench, chat_rows, ferrotune, read_json, text, write_json, write_rows};
use serde_json::{Value, json};

/// Long enough to know two rows by heart.
fn learn(bench: &Workbench) {
    let changes = json!({"use_peft": false, "max_steps": 60, "learning_rate": 3e-3,
                         "lr_scheduler_type": "constant"});
    bench.train("out", &changes).expect(0);
}

/// Keys of the base's tokenizer_config.json.
fn configure_tokenizer(bench: &Workbench, changes: &Value) {
    let path = bench.path("base/tokenizer_config.json");
    let mut settings = read_json(&path);
    let keys = changes.as_object().expect("an object of keys").clone();
    settings.as_object_mut().expect("an object").extend(keys);
    write_json(&path, &settings);
}

/// What `eval` reports on `rows.jsonl` for the model `name`.
fn eval(bench: &Workbench, name: &str, more: &[&str]) -> Value {
    let (model, rows) = (bench.path(name), bench.path("rows.jsonl"));
    let place = [
        "eval",
        "--data",
        text(&rows),
        "--model_name_or_path",
        text(&model),
    ];
    let finished = ferrotune(&[&place[..], more].concat()).expect(0);
    serde_json::from_str(&finished.stdout).expect("JSON")
}

/// The JSON lines of `generate` with the trained model.
fn generate(bench: &Workbench, more: &[&str]) -> Vec<Value> {
    let model = bench.path("out");
    let place = ["generate", "--json", "--model_name_or_path", text(&model)];
    let short = ["--max_new_tokens", "12"];
    let finished = ferrotune(&[&place[..], &short, more].concat()).expect(0);
    let parse = |line: &str| serde_json::from_str(line).expect("JSON");
    finished.stdout.lines().map(parse).collect()
}

#[test]
fn rows_of_text_are_asked_without_the_chat_template() {
    let bench = Workbench::new(0);
    configure_tokenizer(
        &bench,
        &json!({"add_bos_token": true, "add_eos_token": true}),
    );
    let rows = [
        json!({"prompt": "ping: ", "completion": "pong"}),
        json!({"prompt": "pang: ", "completion": "boom<|im_end|>"}),
    ];
    write_rows(&bench.path("rows.jsonl"), &rows);
    learn(&bench);
    let short = ["--exact_match", "--max_new_tokens", "12"];
    assert_eq!(eval(&bench, "out", &short)["eval_exact_match"], 1.0);

    let file = bench.path("rows.jsonl");
    let answered = generate(&bench, &["--prompts_file", text(&file)]);
    assert_eq!(
        answered,
        [
            json!({"prompt": "ping: ", "answer": "pong"}),
            json!({"prompt": "pang: ", "answer": "boom"})
        ]
    );
    let raw = generate(&bench, &["--raw", "--prompt", "ping: "]);
    assert_eq!(raw, [json!({"prompt": "ping: ", "answer": "pong"})]);
    // A prompt on the command line is a message to a model with a template.
    let chat = generate(&bench, &["--prompt", "ping: "]);
    let message = json!([{"role": "user", "content": "ping: "}]);
    assert_eq!(chat[0]["messages"], message);
    assert_ne!(chat[0]["answer"], "pong");
}

#[test]
fn exact_match_shows_the_tools_of_a_row() {
    let bench = Workbench::new(0);
    let template = "{% if tools %}{{ tools[0].name }}\n{% endif %}\
        {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    configure_tokenizer(&bench, &json!({ "chat_template": template }));
    let row = |tool: &str, answer: &str| {
        json!({"messages": [{"role": "user", "content": "call"},
                            {"role": "assistant", "content": answer}],
               "tools": [{"name": tool}]})
    };
    let rows = [row("bell", "ding"), row("horn", "honk")];
    write_rows(&bench.path("rows.jsonl"), &rows);
    learn(&bench);
    let short = ["--exact_match", "--max_new_tokens", "12"];
    assert_eq!(eval(&bench, "out", &short)["eval_exact_match"], 1.0);
    let file = bench.path("asked.jsonl");
    let asked = json!({"prompt": [{"role": "user", "content": "call"}],
                       "tools": [{"name": "horn"}]});
    write_rows(&file, &[asked]);
    let answered = generate(&bench, &["--prompts_file", text(&file)]);
    assert_eq!(answered[0]["answer"], "honk");
}

#[test]
fn the_masks_of_training_choose_the_tokens() {
    let bench = Workbench::new(0);
    let tokens = |more: &[&str]| eval(&bench, "base", more)["eval_num_tokens"].clone();

    // One token per character, EOS behind; the first token of a row is never predicted.
    let pair = json!({"prompt": "12345", "completion": "678"});
    write_rows(&bench.path("rows.jsonl"), &[pair]);
    assert_eq!(tokens(&[]), 4);
    assert_eq!(tokens(&["--completion_only_loss", "true"]), 4);
    assert_eq!(tokens(&["--completion-only-loss", "false"]), 8);

    let body = json!({"body": "12345678", "text": "1"});
    write_rows(&bench.path("rows.jsonl"), &[body]);
    assert_eq!(tokens(&["--dataset_text_field", "body"]), 8);
    assert_eq!(tokens(&[]), 1);

    let tagged = "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}\
        {% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\
        {% endfor %}";
    configure_tokenizer(&bench, &json!({ "chat_template": tagged }));
    let rows = json!({"messages": [{"role": "user", "content": "12345"},
                                   {"role": "assistant", "content": "678"}]});
    write_rows(&bench.path("rows.jsonl"), &[rows]);
    assert_eq!(tokens(&["--assistant_only_loss", "true"]), 3);
    assert_eq!(tokens(&["--assistant_only_loss", "false"]), 9);
}

/// GPT-2 too, whose positions are learned.
#[test]
fn padded_and_packed_rows_of_tokens_are_their_documents() {
    for family in [Family::Llama, Family::Gpt2] {
        let bench = Workbench::of(&family.shape(), 0);
        let score = |rows: &[Value]| {
            write_rows(&bench.path("rows.jsonl"), rows);
            eval(&bench, "base", &[])
        };
        let plain = score(&[
            json!({"input_ids": [5, 9, 7, 30, 11]}),
            json!({"input_ids": [8, 40, 6], "labels": [-100, 40, 6]}),
        ]);
        assert_eq!(plain["eval_num_tokens"], 6);
        let left = [
            json!({"input_ids": [5, 9, 7, 30, 11], "attention_mask": [1, 1, 1, 1, 1]}),
            json!({"input_ids": [0, 0, 8, 40, 6], "attention_mask": [0, 0, 1, 1, 1],
                   "labels": [-100, -100, -100, 40, 6], "position_ids": [1, 1, 0, 1, 2]}),
        ];
        let right = [
            json!({"input_ids": [5, 9, 7, 30, 11, 0], "attention_mask": [1, 1, 1, 1, 1, 0]}),
            json!({"input_ids": [8, 40, 6, 0, 0, 0], "attention_mask": [1, 1, 1, 0, 0, 0],
                   "labels": [-100, 40, 6, -100, -100, -100]}),
        ];
        let both = json!({"input_ids": [5, 9, 7, 30, 11, 8, 40, 6],
                          "labels": [5, 9, 7, 30, 11, -100, 40, 6]});
        let by = |key: &str, value: Value| {
            let mut row = both.clone();
            row[key] = value;
            [row]
        };
        for rows in [
            &left[..],
            &right,
            &by("position_ids", json!([0, 1, 2, 3, 4, 0, 1, 2])),
            &by("seq_lengths", json!([5, 3])),
        ] {
            let found = score(rows);
            for key in [
                "eval_loss",
                "eval_entropy",
                "eval_num_tokens",
                "eval_samples",
            ] {
                assert_eq!(found[key], plain[key], "{family:?} {key} {rows:?}");
            }
        }
        // Without saying so they are one document, which is another thing.
        assert_ne!(
            score(std::slice::from_ref(&both))["eval_loss"],
            plain["eval_loss"]
        );
    }
}

#[test]
fn limit_reads_the_first_rows_alone() {
    let bench = Workbench::new(0);
    let mut rows = chat_rows(5);
    write_rows(&bench.path("rows.jsonl"), &rows[..3]);
    let three = eval(&bench, "base", &[]);
    rows[3] = json!({"nothing": "of use"});
    write_rows(&bench.path("rows.jsonl"), &rows);
    let limited = eval(&bench, "base", &["--limit", "3", "--exact_match"]);
    assert_eq!(limited["eval_samples"], 3);
    assert_eq!(limited["eval_prompts"], 3);
    assert_eq!(limited["eval_loss"], three["eval_loss"]);
}

#[test]
fn rows_that_are_cut_or_left_out_are_counted_and_noted() {
    let bench = Workbench::new(0);
    let row = |length| json!({"prompt": "a".repeat(length), "completion": "bcd"});
    let rows = bench.path("rows.jsonl");
    write_rows(&rows, &[row(4), row(40), row(4), row(8)]);
    let base = bench.path("base");
    let ask = |more: &[&str]| {
        let place = ["eval", "--data", text(&rows)];
        let model = ["--model_name_or_path", text(&base)];
        ferrotune(&[&place[..], &model, more].concat()).expect(0)
    };
    // With its completion and EOS a row is 4 longer than its prompt.
    let finished = ask(&["--max_length", "10"]);
    let result: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    for (key, value) in [
        ("eval_samples", 3),
        ("eval_dropped_rows", 1),
        ("eval_truncated_rows", 2),
        ("eval_tokens_lost", 34 + 2),
    ] {
        assert_eq!(result[key], value, "{key}");
    }
    for part in [
        "note: 2 of the 4 rows of",
        "cut to 10 tokens",
        "lost 36 tokens",
        "note: 1 of the 4 rows of",
        "rows.jsonl:2",
    ] {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
    let whole = ask(&["--max_length", "100"]);
    assert_eq!(whole.stderr, "");
    let result: Value = serde_json::from_str(&whole.stdout).expect("JSON");
    assert_eq!(result["eval_dropped_rows"], 0);
}

#[test]
fn a_token_is_known_by_the_model_and_not_by_the_tokenizer() {
    let bench = Workbench::new(0);
    let (rows, base) = (bench.path("rows.jsonl"), bench.path("base"));
    let size = read_json(&base.join("config.json"))["vocab_size"]
        .as_u64()
        .expect("a number");
    let ask = |last: u64| {
        write_rows(
            &rows,
            &[
                json!({"input_ids": [1, 2]}),
                json!({"input_ids": [1, last]}),
            ],
        );
        let model = ["--model_name_or_path", text(&base)];
        ferrotune(&[&["eval", "--data", text(&rows)][..], &model].concat())
    };
    ask(size - 1).expect(0);
    let refused = ask(size).expect(65).stderr;
    for part in ["rows.jsonl:2", &format!("the vocabulary has {size} ids")] {
        assert!(refused.contains(part), "{refused}");
    }
}

#[test]
fn an_empty_prompt_of_plain_text_is_a_fault_of_the_command_line() {
    let bench = Workbench::new(0);
    let model = ["--model_name_or_path", text(&bench.path("base"))].map(str::to_owned);
    configure_tokenizer(&bench, &json!({"add_bos_token": false}));
    let model = model.each_ref().map(String::as_str);
    let refused = ferrotune(&[&["generate", "--raw", "--prompt", ""][..], &model].concat());
    assert!(
        refused
            .expect(2)
            .stderr
            .contains("--prompt 1 has no tokens")
    );
}

#[test]
fn rows_are_cut_to_the_context_of_the_model_by_default() {
    let bench = Workbench::new(0);
    let long = json!({"text": "a".repeat(400)});
    write_rows(&bench.path("rows.jsonl"), &[long]);
    assert_eq!(eval(&bench, "base", &[])["eval_num_tokens"], 255);
    let shorter = eval(&bench, "base", &["--max_length", "100"]);
    assert_eq!(shorter["eval_num_tokens"], 99);
}

#[test]
fn an_adapter_that_does_not_fit_is_named_by_its_file() {
    let bench = Workbench::new(8);
    bench.train("adapter", &json!({"max_steps": 1})).expect(0);
    let file = bench.path("adapter/adapter_config.json");
    let config = read_json(&file);
    for (key, value) in [
        ("target_modules", json!(["nosuch"])),
        ("alpha_pattern", json!({"nosuch": 8})),
    ] {
        let mut changed = config.clone();
        changed[key] = value;
        std::fs::write(&file, changed.to_string()).expect("writable");
        let finished = ferrotune(&[
            "eval",
            "--model-name-or-path",
            text(&bench.path("base")),
            "--adapter",
            text(&bench.path("adapter")),
            "--data",
            text(&bench.path("rows.jsonl")),
        ])
        .expect(65);
        for part in ["adapter_config.json", key, "nosuch"] {
            assert!(
                finished.stderr.contains(part),
                "{part}: {}",
                finished.stderr
            );
        }
    }
}
