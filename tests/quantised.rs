//! A base in 4 bits: quantised as it is read, or so in its files.

mod common;

use common::{
    Finished, Shape, Stored, Workbench, copy_dir, examples, ferrotune, read_json, text, write_json,
    write_model, write_weights,
};
use ferrotune::core::data::PackedBatch;
use ferrotune::core::io::{FileDType, ModelFiles, SafetensorsFile, TensorData, write_safetensors};
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass, StepShape, WeightFormat, Workload};
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::trainer::attach;
use ferrotune::kernels::dequantise::{FourBitFormat, FourBitType};
use ferrotune::kernels::linear_cross_entropy::Accumulator;
use ferrotune::kernels::{DType, Device, Tensor, View, Workspace, host_cuda};
use ferrotune::lora::{LoraAdapter, LoraConfig, TargetModules};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const SEED: u64 = 11;
const BAD_CONFIG: i32 = 78;
const BAD_INPUT: i32 = 65;

fn formats() -> [FourBitFormat; 3] {
    let format = |quant_type, block, double_quant| FourBitFormat {
        quant_type,
        block,
        double_quant,
    };
    [
        format(FourBitType::Nf4, 64, true),
        format(FourBitType::Nf4, 32, false),
        format(FourBitType::Fp4, 128, true),
    ]
}

/// A model with a LoRA that is not zero on every linear.
struct Subject {
    config: DecoderConfig,
    model: Model,
    adapter: LoraAdapter,
    params: FlatBuffer,
    device: Device,
}

/// What a pass over one micro-batch leaves.
#[derive(PartialEq)]
struct Outcome {
    loss: u64,
    gradients: Vec<u32>,
}

impl Subject {
    fn new(directory: &Path, format: WeightFormat, device: &Device) -> Self {
        let config = DecoderConfig::open(directory).expect("config");
        let files = ModelFiles::open(directory).expect("weights");
        let lora = LoraConfig {
            rank: 3,
            alpha: 6.0,
            target_modules: Some(TargetModules::AllLinear),
            ..LoraConfig::default()
        };
        let adapter = LoraAdapter::new(lora, "llama").expect("valid");
        let (attachments, mut params) = attach(&config, &adapter).expect("attaches");
        params.move_to(device);
        let model = Model::load(&config, attachments, &files, &mut params, format).expect("loads");
        common::add_noise(&mut params, SEED);
        Self {
            config,
            model,
            adapter,
            params,
            device: device.clone(),
        }
    }

    /// Loss and gradients of `batch`, and the bytes of the buffers that took.
    fn run(&self, batch: &PackedBatch) -> (Outcome, u64) {
        let workspace = Workspace::on(self.device.clone(), batch.tokens());
        let pass = Pass {
            workspace: &workspace,
            dtype: self.model.weight_dtype(),
            mode: Mode::Eval,
        };
        let mut grads = FlatBuffer::zeros_on(self.params.layout(), &self.device);
        let mut sums = Accumulator::new(&self.device);
        self.model
            .loss_and_gradients(pass, &self.params, &mut grads, batch, &mut sums)
            .expect("runs");
        let outcome = Outcome {
            loss: sums.read().expect("sums").loss.to_bits(),
            gradients: grads.as_slice().iter().map(|g| g.to_bits()).collect(),
        };
        (outcome, workspace.pooled_bytes() as u64)
    }

    fn predicted(&self, batch: &PackedBatch) -> u64 {
        let (attachments, _) = attach(&self.config, &self.adapter).expect("attaches");
        let workload = Workload {
            documents: 1,
            tokens: batch.tokens(),
            label_rows: [batch.trained_tokens()].into(),
            mean_length: 8.0,
            sizes: Vec::new(),
        };
        let dtypes = [self.model.weight_dtype(); 2];
        let shape = StepShape::new(&self.config, &attachments, &self.device, dtypes, &workload);
        let bytes = shape.with_quantised_linears().predict(&[]).bytes;
        bytes.kept + bytes.working + bytes.loss
    }
}

fn is_linear(name: &str) -> bool {
    name.contains("_proj.weight")
}

/// The model with the values that its linears have in `format`.
fn write_dequantised(directory: &Path, shape: &Shape, format: FourBitFormat) {
    write_model(directory, shape, Stored::Bf16, SEED);
    let mut weights = shape.weights(SEED);
    for (name, (shape, values)) in &mut weights {
        for value in values.iter_mut() {
            *value = half::bf16::from_f32(*value).to_f32();
        }
        if is_linear(name) {
            let view = View::from_f32(values, shape[0], shape[1]);
            let mut out = Tensor::zeros(DType::F32, shape[0], shape[1]);
            let codes = format.quantise(view).expect("finite");
            codes.dequantise(out.view_mut()).expect("the shapes agree");
            assert_ne!(*values, out.to_f32_vec(), "{name} is not rounded");
            *values = out.to_f32_vec();
        }
    }
    let file = directory.join("model.safetensors");
    write_weights(&file, weights.iter(), Stored::F32);
}

/// Not the values alone: the same products in the same order, so the same bits.
fn assert_as_if_dense(device: &Device) {
    let shape = Shape {
        bias: true,
        intermediate: 56,
        ..Shape::default()
    };
    let directory = tempfile::tempdir().expect("temporary directory");
    let [base, dense] = ["base", "dense"].map(|name| directory.path().join(name));
    write_model(&base, &shape, Stored::Bf16, SEED);
    let documents = examples(4, shape.vocab, SEED);
    let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
    for format in formats() {
        write_dequantised(&dense, &shape, format);
        for dtype in [DType::F32, DType::Bf16] {
            let weights = WeightFormat {
                dtype,
                four_bit: Some(format),
            };
            let quantised = Subject::new(&base, weights, device);
            let (ours, pooled) = quantised.run(&batch);
            let (theirs, _) = Subject::new(&dense, dtype.into(), device).run(&batch);
            let label = format!("{format:?} {dtype}");
            assert!(
                ours.gradients.iter().any(|g| f32::from_bits(*g) != 0.0),
                "{label}"
            );
            assert!(ours == theirs, "{label}");
            assert_eq!(pooled, quantised.predicted(&batch), "bytes of {label}");
        }
    }
}

#[test]
fn codes_compute_as_their_values_do() {
    assert_as_if_dense(&Device::Cpu);
}

#[test]
fn codes_compute_as_their_values_do_on_a_gpu() {
    assert_as_if_dense(&Device::Cuda(host_cuda::device()));
}

fn four_bits() -> Value {
    json!({"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": true,
           "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8"})
}

fn with(mut keys: Value, more: &Value) -> Value {
    let more = more.as_object().expect("keys").clone();
    keys.as_object_mut().expect("keys").extend(more);
    keys
}

/// The `eval_loss` that `eval` finds for the adapter in `out`.
fn eval_loss(bench: &Workbench, flags: &[&str]) -> f64 {
    let [base, out, rows] = ["base", "out", "rows.jsonl"].map(|name| bench.path(name));
    let model = [
        "eval",
        "--model_name_or_path",
        text(&base),
        "--adapter",
        text(&out),
        "--data",
        text(&rows),
        "--device",
        "cpu",
    ];
    let finished = ferrotune(&[&model[..], flags].concat()).expect(0);
    let report: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    report["eval_loss"].as_f64().expect("a loss")
}

#[test]
fn a_run_over_4_bits_trains_and_is_evaluated_and_merged() {
    let bench = Workbench::new(16);
    let rows = bench.path("rows.jsonl");
    let evaluated = json!({"eval_file": rows, "eval_strategy": "steps", "eval_steps": 3,
                           "device": "cpu"});
    bench.train("out", &with(four_bits(), &evaluated)).expect(0);

    let state = read_json(&bench.path("out/trainer_state.json"));
    let history = state["log_history"].as_array().expect("a list");
    let trained = history.iter().find_map(|r| r["eval_loss"].as_f64());
    let trained = trained.expect("an evaluation");
    let flags = ["--load-in-4bit", "--bnb-4bit-use-double-quant"];
    let (same, other) = (eval_loss(&bench, &flags), eval_loss(&bench, &[]));
    assert!((same - trained).abs() < 1e-6 * trained, "{same}, {trained}");
    assert!((other - trained).abs() > 1e-4 * trained, "{other}");

    // What is merged into is the checkpoint itself.
    let [base, out, merged] = ["base", "out", "merged"].map(|name| bench.path(name));
    let paths = [
        "--model_name_or_path",
        text(&base),
        "--adapter",
        text(&out),
        "--output_dir",
        text(&merged),
    ];
    ferrotune(&[&["merge"][..], &paths].concat()).expect(0);
    let [before, after] = [&base, &merged].map(|d| common::tensors(&d.join("model.safetensors")));
    let o = "model.layers.0.self_attn.o_proj.weight";
    let q = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(before[o], after[o]);
    assert_ne!(before[q], after[q]);
}

#[test]
fn the_plan_counts_4_bits() {
    let bench = Workbench::new(4);
    let planned = |changes: &Value| {
        let config = bench.config("out", &with(json!({"device": "cpu"}), changes));
        let finished = ferrotune(&["plan", text(&config), "--json"]).expect(0);
        let plan: Value = serde_json::from_str(&finished.stdout).expect("JSON");
        plan["memory_bytes"]["weights"].as_u64().expect("bytes")
    };
    let shape = Shape::default();
    let linears = shape.tensors().into_iter().filter(|(n, _)| is_linear(n));
    let linears: Vec<u64> = linears.map(|(_, s)| (s[0] * s[1]) as u64).collect();
    let dense = planned(&json!({}));
    // Codes, a scale per 64 weights, and the table of 16 values.
    let saved: u64 = linears
        .iter()
        .map(|len| len * 4 - (len.div_ceil(2) + len.div_ceil(64) * 4 + 64))
        .sum();
    assert_eq!(planned(&json!({"load_in_4bit": true})), dense - saved);
}

fn golden(name: &str) -> PathBuf {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/quant");
    cases.join(name)
}

/// A workbench whose base is a checkpoint that Transformers saved in nf4.
fn saved_in_4_bits() -> Workbench {
    let bench = Workbench::of(
        &Shape {
            vocab: 256,
            ..Shape::default()
        },
        4,
    );
    let case = golden("hf_nf4_dq_fp32compute");
    for file in ["config.json", "model.safetensors"] {
        let to = bench.path("base").join(file);
        std::fs::copy(case.join(file), to).expect("writable");
    }
    bench
}

fn said(finished: &Finished, parts: &[&str]) {
    for part in parts {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
}

#[test]
fn a_checkpoint_in_4_bits_trains_without_a_key_and_is_not_merged_into() {
    let bench = saved_in_4_bits();
    bench.train("out", &json!({"device": "cpu"})).expect(0);
    let [base, out, merged] = ["base", "out", "merged"].map(|name| bench.path(name));
    let paths = [
        "--model_name_or_path",
        text(&base),
        "--adapter",
        text(&out),
        "--output_dir",
        text(&merged),
    ];
    let refused = ferrotune(&[&["merge"][..], &paths].concat()).expect(BAD_INPUT);
    said(&refused, &["quantised", "16- or 32-bit"]);
    assert!(!merged.exists());
}

#[test]
fn weights_in_4_bits_are_not_trained() {
    let bench = Workbench::new(4);
    let full = json!({"use_peft": false});
    let refused = bench.train("out", &with(four_bits(), &full));
    said(
        &refused.expect(BAD_CONFIG),
        &["load_in_4bit", "use_peft: true"],
    );
    let refused = saved_in_4_bits().train("out", &full).expect(BAD_CONFIG);
    said(&refused, &["use_peft", "4 bits"]);
}

/// A copy of a saved checkpoint whose tensors went through `change`.
fn damaged(change: impl FnOnce(&mut BTreeMap<String, TensorData<'static>>)) -> String {
    let directory = tempfile::tempdir().expect("temporary directory");
    copy_dir(&golden("hf_nf4_dq_fp32compute"), directory.path());
    let path = directory.path().join("model.safetensors");
    let file = SafetensorsFile::open(&path).expect("sound");
    let tensor = |name: &str| {
        let meta = file.meta(name).expect("listed");
        TensorData {
            dtype: meta.dtype,
            shape: meta.shape.clone(),
            bytes: Cow::Owned(file.read_bytes(name).expect("readable")),
        }
    };
    let mut tensors = file.names().map(|n| (n.to_owned(), tensor(n))).collect();
    change(&mut tensors);
    write_safetensors(&path, &tensors, &BTreeMap::new()).expect("writable");
    let config = DecoderConfig::open(directory.path()).expect("a config");
    let plan = ferrotune::core::model::ModelPlan::new(&config);
    let checked = ModelFiles::open(directory.path())
        .and_then(|files| ferrotune::core::model::WeightSource::check(&files, &plan));
    checked.expect_err("damaged").to_string()
}

#[test]
fn a_damaged_state_is_refused_before_a_weight_is_read() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let state = format!("{Q}.quant_state.bitsandbytes__nf4");
    let part = |name: &str| format!("{Q}.{name}");
    let set = |key: &'static str, value: Value| {
        let state = state.clone();
        damaged(move |tensors| {
            let tensor = tensors.get_mut(&state).expect("there");
            let mut json: Value = serde_json::from_slice(&tensor.bytes).expect("JSON");
            json[key] = value;
            let bytes = json.to_string().into_bytes();
            tensor.shape = vec![bytes.len()];
            tensor.bytes = Cow::Owned(bytes);
        })
    };
    let lose = |name: String| damaged(move |tensors| drop(tensors.remove(&name).expect("there")));
    let cut = |name: String| {
        damaged(move |tensors| {
            let tensor = tensors.get_mut(&name).expect("there");
            let len = tensor.bytes.len() / 2;
            tensor.bytes.to_mut().truncate(len);
            tensor.shape = vec![len / if tensor.dtype == FileDType::F32 { 4 } else { 1 }];
        })
    };
    let rows = [
        (lose(state.clone()), vec![part("absmax"), "missing".into()]),
        (lose(part("absmax")), vec![part("absmax"), "missing".into()]),
        (
            lose(part("nested_quant_map")),
            vec![part("nested_quant_map")],
        ),
        (cut(Q.to_owned()), vec![Q.into(), "1024 bytes".into()]),
        (
            cut(part("quant_map")),
            vec![part("quant_map"), "[16]".into()],
        ),
        (
            set("blocksize", json!(48)),
            vec!["blocksize".into(), "48".into()],
        ),
        (
            set("blocksize", json!(128)),
            vec![part("absmax"), "[32]".into()],
        ),
        (
            set("shape", json!([32, 64])),
            vec![Q.into(), "[32, 64]".into()],
        ),
        (
            set("shape", json!([128, 32])),
            vec![Q.into(), "[64, 64]".into()],
        ),
        (set("quant_type", json!("fp4")), vec!["quant_type".into()]),
        (
            set("nested_blocksize", json!(128)),
            vec!["nested_blocksize".into()],
        ),
        (
            set("nested_offset", Value::Null),
            vec!["nested_offset".into()],
        ),
    ];
    for (message, parts) in rows {
        for part in parts {
            assert!(message.contains(&part), "`{part}` is not in: {message}");
        }
    }
}

#[test]
fn another_quantisation_is_refused_by_name() {
    let bench = saved_in_4_bits();
    let path = bench.path("base/config.json");
    let mut config = read_json(&path);
    config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
    write_json(&path, &config);
    let refused = bench.train("out", &json!({})).expect(BAD_INPUT);
    said(&refused, &["quantization_config", "gptq", "bitsandbytes"]);
}
