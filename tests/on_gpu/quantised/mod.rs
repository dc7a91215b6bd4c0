//! A base that is held as codes: quantised as it is read, or so in its files.

mod ahead;
mod formats;
mod four_bit;
mod gguf;
mod int8;

use crate::common;
use crate::common::{
    Finished, Shape, Stored, Workbench, copy_dir, examples, ferrotune, read_json, text, write_json,
    write_model, write_weights,
};
use ferrotune::core::data::PackedBatch;
use ferrotune::core::io::{FileDType, ModelFiles, SafetensorsFile, TensorData, write_safetensors};
use ferrotune::core::model::{
    DecoderConfig, Mode, Model, Pass, StepMemory, StepShape, WeightFormat, Workload,
};
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::trainer::attach;
use ferrotune::kernels::dequantise::{FourBitFormat, FourBitType, QuantFormat};
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

    /// The bytes of buffers that the planner predicts for linears of `codes`.
    fn predicted(&self, batch: &PackedBatch, codes: impl Fn(StepShape) -> StepShape) -> u64 {
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
        let bytes = codes(shape).predict(&[]).bytes;
        bytes.kept + bytes.working + bytes.loss
    }
}

fn is_linear(name: &str) -> bool {
    name.contains("_proj.weight")
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

/// The bytes of the weights that `plan` counts.
fn planned_weights(bench: &Workbench, changes: &Value) -> u64 {
    let config = bench.config("out", &with(json!({"device": "cpu"}), changes));
    let finished = ferrotune(&["plan", text(&config), "--json"]).expect(0);
    let plan: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    plan["memory_bytes"]["weights"].as_u64().expect("bytes")
}

/// `merge` of the adapter in `out` into the base.
fn merge(bench: &Workbench) -> Finished {
    let [base, out, merged] = ["base", "out", "merged"].map(|name| bench.path(name));
    let paths = [
        "--model_name_or_path",
        text(&base),
        "--adapter",
        text(&out),
        "--output_dir",
        text(&merged),
    ];
    ferrotune(&[&["merge"][..], &paths].concat())
}

fn golden(name: &str) -> PathBuf {
    let cases = common::root().join("tests/fixtures/golden/quant");
    cases.join(name)
}

/// A workbench whose base is a checkpoint that Transformers saved quantised.
fn saved(case: &str) -> Workbench {
    let shape = Shape {
        vocab: 256,
        ..Shape::default()
    };
    let (bench, case) = (Workbench::of(&shape, 4), golden(case));
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

type Tensors = BTreeMap<String, TensorData<'static>>;

/// Writes the weights of a model anew after `change`.
fn change_tensors(directory: &Path, change: impl FnOnce(&mut Tensors)) {
    let path = directory.join("model.safetensors");
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
}

/// What is said of a copy of a saved checkpoint whose tensors went through `change`.
fn damaged(case: &str, change: impl FnOnce(&mut Tensors)) -> String {
    let directory = tempfile::tempdir().expect("temporary directory");
    copy_dir(&golden(case), directory.path());
    change_tensors(directory.path(), change);
    let config = DecoderConfig::open(directory.path()).expect("a config");
    let plan = ferrotune::core::model::ModelPlan::new(&config);
    let checked = ModelFiles::open(directory.path())
        .and_then(|files| ferrotune::core::model::WeightSource::check(&files, &plan));
    checked.expect_err("damaged").to_string()
}
