//! Starts that follow from data, and from a quantised base, beside what PEFT makes of the same
//! (`tests/fixtures/starts`), and in whole runs.

mod common;

use common::{Workbench, assert_same_files, copy_dir, ferrotune, read, read_json, text};
use ferrotune::core::adapter::{Adapter, BaseWeights};
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::io::{ModelFiles, SafetensorsFile};
use ferrotune::core::model::{DecoderConfig, LoadedBase, Mode, Model, ModelPlan, Pass};
use ferrotune::core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune::core::trainer::attach;
use ferrotune::kernels::linear_cross_entropy::Accumulator;
use ferrotune::kernels::{DType, Device, Workspace};
use ferrotune::lora::{InitLoraWeights, LoraAdapter, LoraConfig, Start, TargetModules};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// PEFT decomposes in f32 what is decomposed in f64 here.
const DECOMPOSED: f32 = 1e-3;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn base() -> PathBuf {
    fixtures().join("golden/adapters/_bases/llama")
}

fn expected() -> SafetensorsFile {
    SafetensorsFile::open(fixtures().join("starts/expected.safetensors")).expect("recorded")
}

/// The recorded micro-batches.
fn batches() -> Vec<PackedBatch> {
    let file = SafetensorsFile::open(fixtures().join("starts/batches.safetensors"));
    let file = file.expect("recorded");
    let batch = |i: usize| {
        let [ids, labels] = ["input_ids", "labels"]
            .map(|name| file.read_i64(&format!("{i}.{name}")).expect("recorded"));
        let tokens = file.meta(&format!("{i}.labels")).expect("recorded").shape[1];
        let rows = ids.chunks(tokens).zip(labels.chunks(tokens));
        let examples: Vec<Example> = rows
            .map(|(ids, labels)| Example {
                input_ids: ids.iter().map(|id| *id as u32).collect(),
                labels: labels.iter().map(|label| *label as i32).collect(),
            })
            .collect();
        PackedBatch::pack((0..).zip(&examples))
    };
    (0..4).map(batch).collect()
}

fn method(init: &str, settings: &Value, rank: usize, alpha: f64, targets: &[&str]) -> LoraAdapter {
    let key = match init {
        "eva" => "eva_config",
        "corda" => "corda_config",
        "lora_ga" => "lora_ga_config",
        _ => "loftq_config",
    };
    let start = InitLoraWeights::from_name(init).expect("a start");
    let start = start.configured(key, settings.as_object().expect("an object"));
    let config = LoraConfig {
        rank,
        alpha,
        init_lora_weights: start.expect("valid"),
        target_modules: Some(TargetModules::List(
            targets.iter().map(|&name| name.into()).collect(),
        )),
        ..LoraConfig::default()
    };
    LoraAdapter::new(config, "llama").expect("valid")
}

/// What `method` starts from after the recorded micro-batches, over and over, `most` at most.
fn observed(method: &LoraAdapter, most: usize) -> Start {
    let decoder = DecoderConfig::open(&base()).expect("a model");
    let start = observed_on((&base(), &decoder), method, &batches(), most);
    start.expect("enough was seen")
}

/// The same of `batches`, over and over, with another base.
fn observed_on(
    (base, decoder): (&Path, &DecoderConfig),
    method: &LoraAdapter,
    batches: &[PackedBatch],
    most: usize,
) -> ferrotune::core::Result<Start> {
    let files = ModelFiles::open(base).expect("weights");
    let plan = ModelPlan::new(decoder);
    let mut seen = method
        .observation(&plan)
        .expect("attaches")
        .expect("from data");
    let layout = ParamLayoutBuilder::new().build().expect("empty");
    let (mut params, mut grads) = (FlatBuffer::zeros(&layout), FlatBuffer::zeros(&layout));
    let model =
        Model::load(decoder, seen.attachments(), &files, &mut params, DType::F32).expect("loads");
    let workspace = Workspace::new(64);
    let pass = Pass {
        workspace: &workspace,
        dtype: DType::F32,
        mode: Mode::Eval,
    };
    let mut sums = Accumulator::new(&Device::Cpu);
    for batch in batches.iter().cycle().take(most) {
        seen.begin(&model, batch);
        if seen.needs_gradients() {
            model
                .loss_and_gradients(pass, &params, &mut grads, batch, &mut sums)
                .expect("computes");
        } else {
            model.loss(pass, &params, batch).expect("computes");
        }
        if seen.end() {
            break;
        }
    }
    seen.start(&model)
}

/// A linear's weight before and after `method` has started.
fn prepared(method: &LoraAdapter) -> (Model, FlatBuffer) {
    let decoder = DecoderConfig::open(&base()).expect("a model");
    let files = ModelFiles::open(base()).expect("weights");
    let (attachments, mut params) = attach(&decoder, method).expect("attaches");
    let mut model =
        Model::load(&decoder, attachments, &files, &mut params, DType::F32).expect("loads");
    method.init(&mut params, 0).expect("starts");
    let mut loaded = LoadedBase {
        model: &mut model,
        source: &files,
    };
    method.prepare(&mut params, &mut loaded).expect("prepares");
    (model, params)
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let pairs = a.iter().zip(b);
    pairs.fold(0.0_f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

/// The recorded tensors of a case, by what follows its name.
fn of_case(case: &str) -> Vec<(String, Vec<f32>)> {
    let file = expected();
    let prefix = format!("{case}.");
    let names = file.names().filter_map(|name| name.strip_prefix(&prefix));
    let found: Vec<_> = names
        .map(|name| {
            let values = file.read_f32(&format!("{prefix}{name}")).expect("recorded");
            (name.to_owned(), values)
        })
        .collect();
    assert!(found.len() >= 4, "{case}: {} tensors", found.len());
    found
}

/// What a start has taken out of the weight of `module`.
fn taken(model: &Model, module: &str) -> Vec<f32> {
    let files = ModelFiles::open(base()).expect("weights");
    let before = files.read_f32(&format!("{module}.weight")).expect("there");
    let site = model.find(module).expect("a linear");
    let after = model.read(site).expect("readable").to_f32_vec();
    before.iter().zip(&after).map(|(a, b)| a - b).collect()
}

#[test]
fn eva_finds_the_directions_and_ranks_that_peft_finds() {
    let method = method("eva", &json!({"rho": 2.0}), 8, 8.0, &["q_proj", "v_proj"]);
    let start = observed(&method, 1000);
    let factors = start.factors();
    for (module, a) in of_case("eva") {
        let name = format!("base_model.model.{module}.lora_A.weight");
        let id = factors.layout().find(&name).expect("adapted");
        let error = furthest(factors.get(id), &a);
        assert!(error < DECOMPOSED, "{module}: {error}");
    }
    let adapted = method.starting_from(start).expect("has ranks");
    let config = adapted.config();
    assert_eq!(config.rank_pattern.len(), 4, "{:?}", config.rank_pattern);
    // 9 and 7 of 8: alpha follows, so that the scale stays.
    let (rank, alpha) = config
        .rank_and_alpha()
        .of("model.layers.0.self_attn.q_proj")
        .expect("plain names");
    assert_eq!((rank, alpha), (9, 9.0));
    let (model, params) = prepared(&adapted);
    assert!(
        taken(&model, "model.layers.0.self_attn.q_proj")
            .iter()
            .all(|v| *v == 0.0)
    );
    assert_eq!(
        params.layout().trainable(),
        9 * (32 + 32 + 32 + 16) + 7 * (32 + 32 + 32 + 16)
    );
}

#[test]
fn corda_takes_out_of_the_base_what_peft_takes() {
    for kind in ["ipm", "kpm"] {
        let settings = json!({"corda_method": kind});
        let method = method("corda", &settings, 4, 6.0, &["q_proj", "down_proj"]);
        let start = observed(&method, 4);
        let (model, _) = prepared(&method.starting_from(start).expect("fits"));
        for (module, delta) in of_case(&format!("corda_{kind}")) {
            let error = furthest(&taken(&model, &module), &delta);
            assert!(error < DECOMPOSED, "{kind}, {module}: {error}");
        }
    }
}

#[test]
fn lora_ga_finds_the_directions_that_peft_finds() {
    for (direction, scale) in [("ArB2r", "stable"), ("ArBr", "gd_scale"), ("A2rBr", "unit")] {
        let settings = json!({"direction": direction, "scale": scale});
        let method = method("lora_ga", &settings, 8, 12.0, &["q_proj", "v_proj"]);
        let start = observed(&method, 1);
        let (model, params) = prepared(&method.starting_from(start).expect("fits"));
        for (name, values) in of_case(&format!("ga_{direction}_{scale}")) {
            let (module, part) = name.rsplit_once('.').expect("a part");
            let id = params
                .layout()
                .find(&format!("base_model.model.{module}.lora_{part}.weight"));
            let id = id.expect("adapted");
            let shape = params.layout().segment(id).spec.shape.clone();
            let directions = |values: &[f32]| -> Vec<Vec<f32>> {
                match part {
                    "A" => values.chunks(shape[1]).map(<[f32]>::to_vec).collect(),
                    _ => (0..shape[1])
                        .map(|c| values.iter().skip(c).step_by(shape[1]).copied().collect())
                        .collect(),
                }
            };
            for (ours, theirs) in directions(params.get(id)).iter().zip(directions(&values)) {
                let negated: Vec<f32> = theirs.iter().map(|v| -v).collect();
                let error = furthest(ours, &theirs).min(furthest(ours, &negated));
                assert!(
                    error < 10.0 * DECOMPOSED,
                    "{direction}, {scale}, {name}: {error}"
                );
            }
            // 12 / 8 of their product is what the base has lost.
            let lost: Vec<f32> = product(&params, module).iter().map(|v| 1.5 * v).collect();
            assert!(furthest(&taken(&model, module), &lost) < 1e-4);
        }
    }
}

/// The class of a document is the label of its last token, which may be its only one.
#[test]
fn lora_ga_counts_documents_of_one_token_of_a_classifier() {
    let base = fixtures().join("golden/adapters/_bases/llama_seqcls");
    let decoder = DecoderConfig::open(&base).expect("a model");
    let row = |token: u32| Example {
        input_ids: vec![token],
        labels: vec![(token % 3) as i32],
    };
    let rows: Vec<Example> = (5..13).map(row).collect();
    let batch = PackedBatch::pack((0..).zip(&rows));
    let settings = json!({"stable_gamma": 16});
    let method = method("lora_ga", &settings, 2, 4.0, &["v_proj"]);
    let start = observed_on((&base, &decoder), &method, &[batch], 1);
    start.expect("eight labels are seen");
}

#[test]
fn loftq_quantises_and_starts_as_peft_does() {
    for (bits, iterations) in [(4, 1), (4, 3), (8, 2)] {
        let settings = json!({"loftq_bits": bits, "loftq_iter": iterations});
        let method = method("loftq", &settings, 4, 4.0, &["q_proj", "down_proj"]);
        let (model, params) = prepared(&method);
        for (name, values) in of_case(&format!("loftq_{bits}_{iterations}")) {
            let error = match name.strip_suffix(".base") {
                Some(module) => {
                    let site = model.find(module).expect("a linear");
                    furthest(&model.read(site).expect("readable").to_f32_vec(), &values)
                }
                None => furthest(&product(&params, &name), &values),
            };
            // After a round, a value on the edge between two codes may fall on the other side.
            let tolerance = if iterations == 1 { 1e-4 } else { 2e-3 };
            assert!(
                error < tolerance,
                "{bits} bits, {iterations}, {name}: {error}"
            );
        }
    }
}

/// B A of one module.
fn product(params: &FlatBuffer, module: &str) -> Vec<f32> {
    let find = |part: &str| {
        let name = format!("base_model.model.{module}.lora_{part}.weight");
        let id = params.layout().find(&name).expect("adapted");
        (params.get(id), params.layout().segment(id).spec.shape[1])
    };
    let ((a, inputs), (b, rank)) = (find("A"), find("B"));
    let row = |b: &[f32], i: usize| -> f32 { (0..rank).map(|r| b[r] * a[r * inputs + i]).sum() };
    b.chunks(rank)
        .flat_map(|b| (0..inputs).map(move |i| row(b, i)))
        .collect()
}

#[test]
fn a_larger_scale_than_one_is_not_counted_twice_by_loftq() {
    let settings = json!({"loftq_bits": 4, "loftq_iter": 2});
    let [one, two] = [4.0, 8.0].map(|alpha| {
        let method = method("loftq", &settings, 4, alpha, &["q_proj"]);
        product(&prepared(&method).1, "model.layers.0.self_attn.q_proj")
    });
    let halved: Vec<f32> = one.iter().map(|v| v / 2.0).collect();
    assert!(furthest(&two, &halved) < 1e-5);
}

const NAMES: [&str; 4] = ["eva", "corda", "lora_ga", "loftq"];

fn changes(init: &str) -> Value {
    json!({
        "init_lora_weights": init, "max_steps": 6, "lora_init_batches": 4, "save_strategy": "steps",
        "save_steps": 3, "resume_from_checkpoint": "auto", "lora_r": 3, "lora_alpha": 6,
        "per_device_train_batch_size": 2, "deterministic_reduction": true,
    })
}

fn with(changes: &Value, more: &Value) -> Value {
    let mut all = changes.clone();
    let more = more.as_object().expect("an object").clone();
    all.as_object_mut().expect("an object").extend(more);
    all
}

/// Logits of the first row.
fn answers(bench: &Workbench, base: &Path, adapter: Option<&Path>, flags: &[&str]) -> Vec<f32> {
    let (rows, file) = (bench.path("rows.jsonl"), bench.path("logits.safetensors"));
    let mut arguments = vec!["eval", "--limit", "1", "--model-name-or-path", text(base)];
    arguments.extend(["--data", text(&rows), "--logits-file", text(&file)]);
    arguments.extend(flags);
    if let Some(adapter) = adapter {
        arguments.extend(["--adapter", text(adapter)]);
    }
    ferrotune(&arguments).expect(0);
    let read = SafetensorsFile::open(&file).expect("safetensors");
    read.read_f32("logits").expect("logits")
}

#[test]
fn runs_are_saved_resumed_and_merged_as_they_were_trained() {
    let bench = Workbench::new(12);
    let base = bench.path("base");
    for init in NAMES {
        for converts in [true, false] {
            let whole = format!("{init}_{converts}");
            let changes = with(&changes(init), &json!({"lora_convert_init": converts}));
            bench.train(&whole, &changes).expect(0);
            let part = format!("{whole}_resumed");
            let (from, to) = (bench.path(&whole), bench.path(&part));
            copy_dir(&from.join("checkpoint-3"), &to.join("checkpoint-3"));
            bench.train(&part, &changes).expect(0);
            let files = [
                "adapter_model.safetensors",
                "adapter_config.json",
                "checkpoint-6/optimizer.safetensors",
            ];
            assert_same_files(&from, &to, &files, &format!("{whole}, resumed"));
            let expected = answers(&bench, &base, Some(&from), &[]);
            let moved = furthest(&expected, &answers(&bench, &base, None, &[]));
            assert!(moved > 1e-2, "{init} has learned nothing: {moved}");
            let merged = bench.path(&format!("{whole}_merged"));
            let arguments = [
                "merge",
                "--model-name-or-path",
                text(&base),
                "--adapter",
                text(&from),
            ];
            let arguments = [&arguments[..], &["--output-dir", text(&merged)]].concat();
            if init == "loftq" {
                let finished = ferrotune(&arguments).expect(65);
                assert!(finished.stderr.contains("loftq"), "{}", finished.stderr);
                continue;
            }
            ferrotune(&arguments).expect(0);
            let found = answers(&bench, &merged, None, &[]);
            assert!(furthest(&found, &expected) < 1e-5, "{whole}: merged");
        }
        let own = bench.path(&format!("{init}_false"));
        let there = own.join("initial_adapter");
        if ["corda", "lora_ga"].contains(&init) {
            // It cannot be made again without the data.
            std::fs::remove_dir_all(&there).expect("it was there");
            let (rows, base) = (bench.path("rows.jsonl"), text(&base));
            let arguments = [
                "eval",
                "--model-name-or-path",
                base,
                "--adapter",
                text(&own),
            ];
            let finished = ferrotune(&[&arguments[..], &["--data", text(&rows)]].concat());
            assert!(finished.code != Some(0) && finished.stderr.contains("initial_adapter"));
        } else {
            assert!(!there.exists(), "{init}");
        }
    }
    let config = read_json(&bench.path("eva_true/adapter_config.json"));
    assert_eq!(config["init_lora_weights"], true);
    assert!(config["rank_pattern"].is_object(), "{config}");
    let config = read_json(&bench.path("loftq_true/adapter_config.json"));
    assert_eq!(config["init_lora_weights"], "loftq");
    assert_eq!(config["loftq_config"]["loftq_bits"], 4);
}

#[test]
fn two_ranks_start_and_train_as_one_does() {
    let bench = Workbench::new(12);
    for init in NAMES {
        let (one, two) = (format!("{init}_one"), format!("{init}_two"));
        let alone = with(&changes(init), &json!({"gradient_accumulation_steps": 2}));
        bench.train(&one, &alone).expect(0);
        let config = bench.config(&two, &changes(init));
        ferrotune(&["launch", "--nproc", "2", "--", "train", text(&config)]).expect(0);
        let adapter = |name: &str| read(&bench.path(name).join("adapter_model.safetensors"));
        assert!(adapter(&one) == adapter(&two), "{init}");
    }
}

#[test]
fn loftq_is_nearer_to_the_base_than_its_four_bits_alone() {
    let bench = Workbench::new(6);
    let base = bench.path("base");
    let exact = answers(&bench, &base, None, &[]);
    let codes = answers(&bench, &base, None, &["--load-in-4bit"]);
    let learns_nothing = json!({
        "load_in_4bit": true, "init_lora_weights": "loftq", "learning_rate": 0.0, "lora_r": 12, "lora_alpha": 12,
        "lora_target_modules": "all-linear", "loftq_config": {"loftq_iter": 4},
    });
    bench.train("out", &learns_nothing).expect(0);
    let adapter = bench.path("out");
    let started = answers(&bench, &base, Some(&adapter), &["--load-in-4bit"]);
    let (lost, left) = (furthest(&codes, &exact), furthest(&started, &exact));
    assert!(left < 0.7 * lost, "{left} {lost}");
}

#[test]
fn what_a_start_from_data_cannot_do_is_said() {
    let bench = Workbench::new(3);
    let of = |init: &str, more: Value| with(&changes(init), &more);
    for (changes, parts) in [
        (
            of("corda", json!({"load_in_4bit": true})),
            &["`init_lora_weights`", "corda"][..],
        ),
        (
            of("lora_ga", json!({"lora_r": 9})),
            &["`lora_r`", "lora_ga", "two directions", "v_proj"],
        ),
        (
            of("eva", json!({"lora_r": 17})),
            &["`lora_r`", "eva", "rho"],
        ),
        (
            of("eva", json!({"eva_config": {"rho": 0.1}})),
            &["rho", "at least 1"],
        ),
        (
            of("eva", json!({"corda_config": {}})),
            &["`corda_config`", "eva", "corda"],
        ),
        (
            of("loftq", json!({"loftq_config": {"loftq_bits": 3}})),
            &["loftq_bits", "4 (nf4)"],
        ),
        (
            of(
                "loftq",
                json!({"load_in_4bit": true, "loftq_config": {"loftq_bits": 8}}),
            ),
            &["loftq_bits", "4"],
        ),
        (
            of("lora_ga", json!({"lora_init_batches": 0})),
            &["`lora_init_batches`"],
        ),
        (
            json!({"peft_config": {"peft_type": "VERA", "r": 8}, "eva_config": {}}),
            &["`eva_config`", "peft_config"],
        ),
        // 24 components of fewer tokens.
        (
            of(
                "eva",
                json!({"lora_r": 12, "per_device_train_batch_size": 1, "max_length": 16}),
            ),
            &["eva_config", "seen no micro-batch"],
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
