//! Starts that change the base: what the model computes then, what is saved, and how a run goes on.

mod common;

use common::{
    Finished, Shape, Workbench, assert_same_files, copy_dir, ferrotune, read, read_json, text,
};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::PackedBatch;
use ferrotune::core::io::{ModelFiles, SafetensorsFile};
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass, WeightFormat};
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::trainer::attach;
use ferrotune::kernels::dequantise::{FourBitFormat, FourBitType, QuantFormat};
use ferrotune::kernels::{DType, Workspace};
use ferrotune::lora::{InitLoraWeights, LoraAdapter, LoraConfig, TargetModules};
use serde_json::{Value, json};
use std::path::Path;

/// Of a base in f32.
const NAMES: [&str; 4] = ["pissa", "pissa_niter_2", "pissa_niter_16", "olora"];

fn with(changes: &Value, more: &Value) -> Value {
    let mut all = changes.clone();
    let more = more.as_object().expect("an object").clone();
    all.as_object_mut().expect("an object").extend(more);
    all
}

fn adapter(init: &str, targets: &[&str]) -> LoraAdapter {
    let config = LoraConfig {
        rank: 4,
        alpha: 6.0,
        target_modules: Some(TargetModules::List(
            targets.iter().map(|&name| name.into()).collect(),
        )),
        init_lora_weights: InitLoraWeights::from_name(init).expect("a start"),
        ..LoraConfig::default()
    };
    LoraAdapter::new(config, "llama").expect("valid")
}

/// Logits of the first examples, with `method` at its start if there is one.
fn logits(base: &Path, format: WeightFormat, method: Option<&dyn Adapter>) -> Vec<f32> {
    let config = DecoderConfig::open(base).expect("a model");
    let files = ModelFiles::open(base).expect("weights");
    let (attachments, mut params) = match method {
        Some(method) => attach(&config, method).expect("attaches"),
        None => {
            let layout = ferrotune::core::params::ParamLayoutBuilder::new().build();
            (Vec::new(), FlatBuffer::zeros(&layout.expect("empty")))
        }
    };
    let mut model = Model::load(&config, attachments, &files, &mut params, format).expect("loads");
    if let Some(method) = method {
        method.init(&mut params, 3).expect("starts");
        method.prepare(&mut params, &mut model).expect("prepares");
    }
    let examples = common::examples(4, config.vocab_size, 5);
    let batch = PackedBatch::pack((0..).zip(&examples));
    let workspace = Workspace::new(batch.tokens());
    let pass = Pass {
        workspace: &workspace,
        dtype: DType::F32,
        mode: Mode::Eval,
    };
    let logits = model.logits(pass, &params, &batch).expect("computes");
    logits.to_f32_vec()
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let pairs = a.iter().zip(b);
    pairs.fold(0.0_f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

#[test]
fn a_start_leaves_the_output_of_the_base() {
    // Fused and transposed linears too: Phi 3 and GPT-2.
    let families = [
        (
            common::Family::Llama,
            &["q_proj", "v_proj", "down_proj"][..],
        ),
        (common::Family::Phi3, &["qkv_proj", "down_proj"]),
        (common::Family::Gpt2, &["c_attn", "c_fc"]),
    ];
    for (family, targets) in families {
        let shape = Shape {
            family,
            kv_heads: 4,
            bias: family == common::Family::Gpt2,
            ..Shape::default()
        };
        let bench = Workbench::of(&shape, 1);
        let base = bench.path("base");
        let expected = logits(&base, DType::F32.into(), None);
        for name in NAMES {
            let method = adapter(name, targets);
            let found = logits(&base, DType::F32.into(), Some(&method));
            let error = furthest(&found, &expected);
            assert!(error < 1e-5, "{family:?}, {name}: {error}");
        }
    }
}

#[test]
fn a_base_in_four_bits_keeps_olora_and_refuses_what_needs_its_values() {
    let bench = Workbench::new(1);
    let base = bench.path("base");
    let format = WeightFormat {
        dtype: DType::F32,
        quantise: Some(
            QuantFormat::FourBit(FourBitFormat {
                quant_type: FourBitType::Nf4,
                block: 64,
                double_quant: false,
            })
            .into(),
        ),
    };
    let expected = logits(&base, format.clone(), None);
    let method = adapter("olora", &["q_proj", "v_proj"]);
    // What is left of a weight is quantised again, which moves the output as quantising does.
    let error = furthest(&logits(&base, format.clone(), Some(&method)), &expected);
    let quantising = furthest(&expected, &logits(&base, DType::F32.into(), None));
    assert!(error < 2.0 * quantising, "{error} {quantising}");
    let changes = json!({"load_in_4bit": true, "init_lora_weights": "pissa"});
    let finished = bench.train("out", &changes).expect(78);
    for part in ["`init_lora_weights`", "pissa", "load_in_4bit", "olora"] {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
    assert!(!bench.path("out/adapter_config.json").exists());
}

/// Logits of the first row with the adapter in `adapter`, or of another base.
fn answers(bench: &Workbench, base: &Path, adapter: Option<&Path>) -> Vec<f32> {
    let (rows, file) = (bench.path("rows.jsonl"), bench.path("logits.safetensors"));
    let mut arguments = vec!["eval", "--limit", "1", "--model-name-or-path", text(base)];
    arguments.extend(["--data", text(&rows), "--logits-file", text(&file)]);
    if let Some(adapter) = adapter {
        arguments.extend(["--adapter", text(adapter)]);
    }
    ferrotune(&arguments).expect(0);
    let read = SafetensorsFile::open(&file).expect("safetensors");
    read.read_f32("logits").expect("logits")
}

fn merge(bench: &Workbench, adapter: &Path, to: &Path) -> Finished {
    let base = bench.path("base");
    ferrotune(&[
        "merge",
        "--model-name-or-path",
        text(&base),
        "--adapter",
        text(adapter),
        "--output-dir",
        text(to),
    ])
}

#[test]
fn what_is_saved_is_the_trained_model_in_either_form_and_merges() {
    let bench = Workbench::new(12);
    let base = bench.path("base");
    let switches = json!({
        "init_lora_weights": "pissa", "use_rslora": true, "use_dora": true, "lora_r": 3, "lora_alpha": 4,
        "lora_rank_pattern": {"v_proj": 2}, "lora_alpha_pattern": {"down_proj": 5},
        "lora_modules_to_save": ["norm"],
    });
    for (name, changes) in [
        ("pissa", json!({"init_lora_weights": "pissa"})),
        (
            "olora",
            json!({"init_lora_weights": "olora", "use_rslora": true}),
        ),
        ("switches", switches),
    ] {
        let plain = bench.path(name);
        bench.train(name, &changes).expect(0);
        let config = read_json(&plain.join("adapter_config.json"));
        let rank = changes["lora_r"].as_u64().unwrap_or(4);
        assert_eq!(config["init_lora_weights"], true, "{name}");
        assert_eq!(config["r"], 2 * rank, "{name}");
        let own = bench.path(&format!("{name}_own"));
        let own_name = format!("{name}_own");
        let keeps = with(&changes, &json!({"lora_convert_init": false}));
        bench.train(&own_name, &keeps).expect(0);
        let config = read_json(&own.join("adapter_config.json"));
        assert_eq!(config["init_lora_weights"], changes["init_lora_weights"]);
        assert_eq!(config["r"], rank, "{name}");
        let expected = answers(&bench, &base, Some(&plain));
        let moved = furthest(&expected, &answers(&bench, &base, None));
        assert!(moved > 1e-2, "{name} has learned nothing: {moved}");
        let found = answers(&bench, &base, Some(&own));
        assert!(furthest(&found, &expected) < 1e-5, "{name}: two forms");
        // Without its start, which PEFT does not save, the start is done again.
        std::fs::remove_dir_all(own.join("initial_adapter")).expect("it was there");
        let found = answers(&bench, &base, Some(&own));
        assert!(furthest(&found, &expected) < 1e-5, "{name}: started again");
        for adapter in [&plain, &own] {
            let merged = bench.path("merged");
            merge(&bench, adapter, &merged).expect(0);
            let found = answers(&bench, &merged, None);
            assert!(furthest(&found, &expected) < 1e-5, "{name}: merged");
            std::fs::remove_dir_all(&merged).expect("just written");
        }
    }
}

#[test]
fn a_resumed_run_has_the_base_and_the_bytes_of_the_uninterrupted_one() {
    let bench = Workbench::new(12);
    for init in ["pissa", "pissa_niter_4", "olora"] {
        for converts in [true, false] {
            let whole = format!("{init}_{converts}");
            let changes = json!({
                "init_lora_weights": init, "lora_convert_init": converts, "max_steps": 6,
                "save_strategy": "steps", "save_steps": 3, "resume_from_checkpoint": "auto",
            });
            bench.train(&whole, &changes).expect(0);
            let part = format!("{whole}_resumed");
            let (from, to) = (bench.path(&whole), bench.path(&part));
            copy_dir(&from.join("checkpoint-3"), &to.join("checkpoint-3"));
            bench.train(&part, &changes).expect(0);
            let files = [
                "adapter_model.safetensors",
                "checkpoint-6/adapter_model.safetensors",
                "checkpoint-6/optimizer.safetensors",
            ];
            assert_same_files(&from, &to, &files, &format!("{whole}, resumed"));
        }
    }
}

#[test]
fn ranks_train_what_one_trains() {
    let bench = Workbench::new(12);
    let changes = json!({
        "init_lora_weights": "pissa", "max_steps": 4, "per_device_train_batch_size": 1,
        "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "auto",
        "deterministic_reduction": true,
    });
    let alone = with(&changes, &json!({"gradient_accumulation_steps": 2}));
    bench.train("alone", &alone).expect(0);
    let launch = |name: &str| {
        let config = bench.config(name, &changes);
        ferrotune(&["launch", "--nproc", "2", "--", "train", text(&config)]).expect(0);
        read(&bench.path(name).join("adapter_model.safetensors"))
    };
    let together = launch("together");
    assert!(together == read(&bench.path("alone/adapter_model.safetensors")));
    // The second rank knows of the checkpoint by the first alone.
    let from = bench.path("together/checkpoint-2");
    copy_dir(&from, &bench.path("resumed/checkpoint-2"));
    assert!(launch("resumed") == together);
}

#[test]
fn what_a_start_cannot_do_is_said_before_anything_is_written() {
    let bench = Workbench::new(3);
    for (changes, parts) in [
        (
            json!({"init_lora_weights": "pissa", "lora_r": 33}),
            &["`lora_r`", "33", "32", "q_proj", "rank_pattern"][..],
        ),
        (
            json!({"init_lora_weights": "olora", "lora_target_modules": ["q_proj", "lm_head"]}),
            &["`init_lora_weights`", "lm_head", "olora"],
        ),
        (
            json!({"init_lora_weights": "olora", "lora_target_modules": ["embed_tokens"]}),
            &["`init_lora_weights`", "embed_tokens"],
        ),
        (
            json!({"init_lora_weights": "pissa_niter_x"}),
            &["`init_lora_weights`", "pissa_niter_16"],
        ),
        (
            json!({"init_lora_weights": "olorra"}),
            &["`init_lora_weights`", "did you mean `olora`"],
        ),
        (
            json!({"init_lora_weights": "pissa", "lora_b_bias": true}),
            &["`lora_b_bias`", "init_lora_weights"],
        ),
    ] {
        let finished = bench.train("out", &changes).expect(78);
        for part in parts {
            assert!(
                finished.stderr.contains(part),
                "{changes}: {}",
                finished.stderr
            );
        }
        assert!(!bench.path("out/adapter_config.json").exists());
    }
}

#[test]
fn an_adapter_of_another_start_is_refused() {
    let bench = Workbench::new(6);
    let own = json!({"init_lora_weights": "pissa", "lora_convert_init": false});
    bench.train("pissa", &own).expect(0);
    let initial = bench.path("pissa/initial_adapter");
    let other = json!({"init_lora_weights": "olora", "lora_convert_init": false});
    bench.train("olora", &other).expect(0);
    // The start of another run is a valid one, of another model.
    let adapter = adapter("pissa", &["q_proj", "v_proj", "down_proj"]);
    let error = adapter.start_of(&bench.path("olora")).expect_err("another");
    assert!(error.to_string().contains("init_lora_weights"), "{error}");
    let file = initial.join("adapter_model.safetensors");
    std::fs::write(&file, b"damaged").expect("writable");
    let (base, rows) = (bench.path("base"), bench.path("rows.jsonl"));
    let adapter = bench.path("pissa");
    let arguments = [
        "eval",
        "--model-name-or-path",
        text(&base),
        "--adapter",
        text(&adapter),
    ];
    let finished = ferrotune(&[&arguments[..], &["--data", text(&rows)]].concat()).expect(65);
    assert!(
        finished.stderr.contains("initial_adapter"),
        "{}",
        finished.stderr
    );
}
