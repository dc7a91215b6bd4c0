//! Several adapters over one base answer and are evaluated as each does alone, and change while the base stays.

use crate::common;
use crate::common::{Workbench, chat_rows, ferrotune, text, write_rows};
use ferrotune::TextModel;
use ferrotune::core::Result;
use ferrotune::core::data::PackedBatch;
use ferrotune::generate::{GenerateOptions, Question};
use ferrotune::kernels::{Device, host_cuda};
use serde_json::{Value, json};
use std::path::PathBuf;

const BAD_CONFIG: i32 = 64;
const PROMPTS: [&str; 3] = ["1234", "99 1", "what is it"];

/// Adapters of other methods, trained until their answers differ.
fn trained() -> (Workbench, [PathBuf; 3]) {
    let bench = Workbench::new(4);
    let keys = |more: Value| {
        let mut keys = json!({"max_steps": 6, "learning_rate": 0.05, "lr_scheduler_type": "constant", "seed": 1});
        let map = keys.as_object_mut().expect("an object");
        map.extend(more.as_object().expect("an object").clone());
        keys
    };
    let vera = json!({"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "o_proj"], "projection_prng_key": 3});
    let each = [
        (
            "lora",
            json!({"lora_r": 4, "lora_target_modules": "all-linear"}),
        ),
        (
            "dora",
            json!({"lora_r": 3, "use_dora": true, "lora_target_modules": ["q_proj", "up_proj"], "seed": 2}),
        ),
        ("vera", json!({"peft_config": vera, "learning_rate": 0.3})),
    ];
    let paths = each.map(|(name, more)| {
        bench.train(name, &keys(more)).expect(0);
        bench.path(name)
    });
    (bench, paths)
}

fn options(temperature: f64) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens: 12,
        temperature,
        batch_size: 4,
        ..GenerateOptions::default()
    }
}

/// Ids of the prompts.
fn asked(model: &TextModel) -> Vec<Vec<u32>> {
    let encoded = PROMPTS
        .iter()
        .map(|prompt| model.encode(&model.prompt(prompt)));
    encoded.collect::<Result<_>>().expect("encoded")
}

fn batch() -> PackedBatch {
    let documents = common::examples(3, 60, 5);
    PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)))
}

/// What a model answers, and its loss.
fn outcome(model: &TextModel, temperature: f64) -> (Vec<String>, f64) {
    let answers = model.answer(&asked(model), &options(temperature));
    (
        answers.expect("answers"),
        model.loss(&batch()).expect("a loss").loss,
    )
}

fn assert_as(ours: &(Vec<String>, f64), alone: &(Vec<String>, f64), what: &str) {
    assert_eq!(ours.0, alone.0, "{what}");
    assert!(
        (ours.1 / alone.1 - 1.0).abs() < 1e-6,
        "{what}: {} {}",
        ours.1,
        alone.1
    );
}

#[test]
fn each_answers_as_it_does_alone() {
    let (bench, paths) = trained();
    let base = bench.path("base");
    for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
        for temperature in [0.0, 1.0] {
            let alone = |path: Option<&PathBuf>| {
                let model = TextModel::load_on(&device, &base, path.map(PathBuf::as_path));
                outcome(&model.expect("loads"), temperature)
            };
            let names = ["one", "two", "three"];
            let adapters = names.into_iter().zip(paths.iter().map(PathBuf::as_path));
            let mut model =
                TextModel::load_together(&device, &base, adapters, None).expect("loads");
            let expected: Vec<_> = paths.iter().map(|path| alone(Some(path))).collect();
            assert_ne!(expected[0].0, expected[1].0);
            assert_ne!(expected[0].0, alone(None).0);
            for (name, expected) in names.iter().zip(&expected) {
                model.set_adapter(name).expect("is there");
                assert_as(&outcome(&model, temperature), expected, name);
            }
            // All at once, more than run together, in a mixed order.
            let ids = asked(&model);
            let order = [
                (2, 0),
                (0, 0),
                (1, 0),
                (0, 1),
                (2, 1),
                (1, 1),
                (1, 2),
                (0, 2),
                (2, 2),
            ];
            let questions = order.map(|(voice, prompt): (usize, usize)| Question {
                voice,
                ids: ids[prompt].clone(),
            });
            let answers = model
                .answer_together(&questions, &options(temperature))
                .expect("answers");
            for ((voice, prompt), answer) in order.into_iter().zip(answers) {
                assert_eq!(
                    answer, expected[voice].0[prompt],
                    "{} {prompt}",
                    names[voice]
                );
            }
        }
    }
}

#[test]
fn adapters_come_and_go_while_the_base_stays() {
    let (bench, [lora, dora, vera]) = trained();
    let base = bench.path("base");
    let alone = |path: &PathBuf| outcome(&TextModel::load(&base, Some(path)).expect("loads"), 0.0);
    let mut model = TextModel::load(&base, None).expect("loads");
    let bare = outcome(&model, 0.0);
    model.add_adapter("it", &lora).expect("fits");
    assert_as(&outcome(&model, 0.0), &bare, "the base is still active");
    model.set_adapter("it").expect("is there");
    assert_as(&outcome(&model, 0.0), &alone(&lora), "added");
    model.replace_adapter("it", &dora).expect("fits");
    assert_as(&outcome(&model, 0.0), &alone(&dora), "exchanged");
    model.add_adapter("more", &vera).expect("fits");

    // What fails leaves what was there.
    let cut = bench.path("cut");
    common::copy_dir(&lora, &cut);
    let file = cut.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).expect("readable");
    std::fs::write(&file, &bytes[..bytes.len() / 2]).expect("writable");
    model.replace_adapter("it", &cut).expect_err("half a file");
    assert_as(&outcome(&model, 0.0), &alone(&dora), "after a failure");
    let said = |error: ferrotune::core::Error| error.to_string();
    let taken = said(model.add_adapter("more", &lora).expect_err("taken"));
    assert!(taken.contains("`more`"), "{taken}");
    let unknown = said(model.set_adapter("mroe").expect_err("unknown"));
    assert!(unknown.contains("more"), "{unknown}");

    model.remove_adapter("it").expect("is there");
    assert_as(&outcome(&model, 0.0), &bare, "taken away");
    model.set_adapter("more").expect("is there");
    assert_as(&outcome(&model, 0.0), &alone(&vera), "the other one");
    model.remove_adapter("").expect("the base alone");
    model.remove_adapter("more").expect_err("the last one");

    let mut own = TextModel::load(&base, Some(&lora)).expect("loads");
    let refused = said(
        own.add_adapter("more", &dora)
            .expect_err("is part of the model"),
    );
    assert!(refused.contains("beside one another"), "{refused}");
}

#[test]
fn what_reaches_beyond_the_linears_of_layers_answers_alone() {
    let bench = Workbench::new(4);
    let short = json!({"max_steps": 1, "lora_r": 2});
    bench.train("plain", &short).expect(0);
    let beyond = [
        json!({"max_steps": 1, "lora_modules_to_save": ["norm"], "lora_r": 2}),
        json!({"max_steps": 1, "lora_r": 2, "lora_target_modules": ["embed_tokens", "q_proj"]}),
        json!({"max_steps": 1, "peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}}),
        json!({"max_steps": 1, "peft_config": {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"]}}),
        json!({"max_steps": 1, "lora_r": 2, "lora_layer_replication": [[0, 1], [0, 1]]}),
    ];
    let (base, plain) = (bench.path("base"), bench.path("plain"));
    for (i, keys) in beyond.iter().enumerate() {
        let name = format!("beyond{i}");
        bench.train(&name, keys).expect(0);
        let (place, plain) = (bench.path(&name), text(&plain));
        let arguments = [
            "generate",
            "--model_name_or_path",
            text(&base),
            "--prompt",
            "1",
            "--adapter",
            plain,
            "--adapter",
            text(&place),
        ];
        let refused = ferrotune(&arguments).expect(BAD_CONFIG + 1);
        for word in [
            name.as_str(),
            "adapter_config.json",
            "beside other adapters",
        ] {
            assert!(refused.stderr.contains(word), "{keys}: {}", refused.stderr);
        }
    }
}

#[test]
fn commands_name_who_answered() {
    let (bench, [lora, dora, _]) = trained();
    let base = bench.path("base");
    let (named, plain) = (format!("fast={}", text(&lora)), text(&dora));
    let place = [
        "--model_name_or_path",
        text(&base),
        "--adapter",
        &named,
        "--adapter",
        plain,
    ];
    let lines = |arguments: &[&str]| -> Vec<Value> {
        let finished = ferrotune(arguments).expect(0);
        let lines = finished.stdout.lines();
        lines
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect()
    };
    let alone = |command: &[&str], adapter: &PathBuf| {
        let place = [
            "--model_name_or_path",
            text(&base),
            "--adapter",
            text(adapter),
        ];
        lines(&[command, &place].concat())
    };

    let asked = bench.path("asked.jsonl");
    write_rows(
        &asked,
        &[
            json!({"prompt": "12"}),
            json!({"prompt": "34", "adapter": "fast"}),
        ],
    );
    let command = [
        "generate",
        "--json",
        "--max_new_tokens",
        "8",
        "--prompt",
        "5",
        "--prompts_file",
        text(&asked),
    ];
    let together = lines(&[&command[..], &place].concat());
    let who: Vec<&Value> = together.iter().map(|line| &line["adapter"]).collect();
    assert_eq!(who, ["fast", plain, "fast", plain, "fast"]);
    let [fast, other] = [&lora, &dora].map(|adapter| alone(&command, adapter));
    let expected = [&fast[0], &other[0], &fast[1], &other[1], &fast[2]];
    for (line, expected) in together.iter().zip(expected) {
        assert_eq!(line["answer"], expected["answer"]);
        assert!(expected.get("adapter").is_none());
    }

    write_rows(&asked, &[json!({"prompt": "34", "adapter": "fats"})]);
    let command = ["generate", "--prompts_file", text(&asked)];
    let refused = ferrotune(&[&command[..], &place].concat()).expect(BAD_CONFIG + 1);
    for word in ["asked.jsonl:1", "`fats`", "`fast`"] {
        assert!(refused.stderr.contains(word), "{}", refused.stderr);
    }

    let rows = bench.path("rows.jsonl");
    write_rows(&rows, &chat_rows(3));
    let command = [
        "eval",
        "--data",
        text(&rows),
        "--exact_match",
        "--max_new_tokens",
        "4",
    ];
    let together = lines(&[&command[..], &place].concat());
    assert_eq!(together.len(), 2);
    for (line, (name, adapter)) in together.iter().zip([("fast", &lora), (plain, &dora)]) {
        let alone = &alone(&command, adapter)[0];
        assert_eq!(line["adapter"], name);
        let [ours, theirs] = [line, alone].map(|v| v["eval_loss"].as_f64().expect("a number"));
        assert!(
            (ours / theirs - 1.0).abs() < 1e-6,
            "{name}: {ours} {theirs}"
        );
        assert_eq!(line["eval_exact_match"], alone["eval_exact_match"]);
    }
}
