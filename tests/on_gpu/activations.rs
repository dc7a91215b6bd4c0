//! What layers keep changes the memory of a step and no bit of its result; and the planner knows the
//! memory before anything is allocated.

use crate::common;
use crate::common::output_scaling::OutputScaling;
use crate::common::{Family, Shape, Stored, examples, write_model};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::full::FullFineTuning;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{
    ActivationPlan, DecoderConfig, Keep, Mode, Model, Pass, StepShape, Workload,
};
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::trainer::attach;
use ferrotune::kernels::linear_cross_entropy::Accumulator;
use ferrotune::kernels::{DType, Device, Workspace, host_cuda};
use ferrotune::lora::{LoraAdapter, LoraConfig, PeftConfig, TargetModules};
use serde_json::{Value, json};
use std::path::Path;

const SEED: u64 = 3;
const LAYERS: usize = 4;
const MIXED: [Keep; LAYERS] = [Keep::Input, Keep::DropGateUp, Keep::All, Keep::Input];

/// Every layer alike, and layers mixed.
fn policies() -> Vec<Vec<Keep>> {
    use Keep::{All, DropGateUp, Input};
    vec![
        vec![DropGateUp; LAYERS],
        vec![Input; LAYERS],
        MIXED.to_vec(),
        vec![All, Input, All, DropGateUp],
    ]
}

fn lora_with_dropout() -> Box<dyn Adapter> {
    let config = LoraConfig {
        rank: 5,
        alpha: 12.0,
        dropout: 0.3,
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    };
    Box::new(LoraAdapter::new(config, "llama").expect("valid"))
}

fn dora_with_dropout() -> Box<dyn Adapter> {
    // Tables, whose columns are scaled, and linears and the head, whose rows are.
    let modules = [
        "embed_tokens",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "up_proj",
        "down_proj",
        "lm_head",
    ];
    let config = LoraConfig {
        rank: 5,
        alpha: 12.0,
        dropout: 0.3,
        use_dora: true,
        target_modules: Some(TargetModules::List(modules.map(String::from).into())),
        ..LoraConfig::default()
    };
    Box::new(LoraAdapter::new(config, "llama").expect("valid"))
}

fn method(mut keys: Value) -> Box<dyn Adapter> {
    keys["target_modules"] = json!(r".*_proj|lm_head");
    let object = keys.as_object().expect("an object");
    let config = PeftConfig::from_config("peft_config", object).expect("a known method");
    config.into_adapter("llama").expect("valid")
}

fn lora_on_later_layers() -> Box<dyn Adapter> {
    let config = LoraConfig {
        rank: 3,
        target_modules: Some(TargetModules::List(vec![
            "q_proj".into(),
            "down_proj".into(),
        ])),
        layers_to_transform: Some(vec![2, 3]),
        ..LoraConfig::default()
    };
    Box::new(LoraAdapter::new(config, "llama").expect("valid"))
}

/// A model with an adapter on one device.
struct Subject {
    config: DecoderConfig,
    model: Model,
    adapter: Box<dyn Adapter>,
    params: FlatBuffer,
    device: Device,
    dtype: DType,
    /// Of how many layers what they keep goes to host memory.
    offloaded: usize,
}

/// What a pass over one micro-batch leaves.
struct Outcome {
    loss: u64,
    gradients: Vec<u32>,
    pooled: usize,
}

impl Subject {
    fn new(directory: &Path, adapter: Box<dyn Adapter>, device: &Device, dtype: DType) -> Self {
        let config = DecoderConfig::open(directory).expect("config");
        let files = ModelFiles::open(directory).expect("weights");
        let (attachments, mut params) = attach(&config, adapter.as_ref()).expect("attaches");
        params.move_to(device);
        let model = Model::load(&config, attachments, &files, &mut params, dtype).expect("loads");
        // A fresh B is zero, and so would the gradient of A be.
        common::add_noise(&mut params, SEED);
        Self {
            config,
            model,
            adapter,
            params,
            device: device.clone(),
            dtype,
            offloaded: 0,
        }
    }

    fn run(&mut self, keep: &[Keep], batch: &PackedBatch) -> Outcome {
        self.model.set_keep(keep);
        let workspace = Workspace::on(self.device.clone(), batch.tokens());
        let pass = Pass {
            workspace: &workspace,
            dtype: self.dtype,
            mode: Mode::Train {
                seed: SEED,
                step: 5,
            },
        };
        let mut grads = FlatBuffer::zeros_on(self.params.layout(), &self.device);
        let mut sums = Accumulator::new(&self.device);
        // Twice: the second pass must not need more than the first.
        let mut pooled = 0;
        for _ in 0..2 {
            grads.zero();
            sums = Accumulator::new(&self.device);
            self.model
                .loss_and_gradients(pass, &self.params, &mut grads, batch, &mut sums)
                .expect("runs");
            assert!(pooled == 0 || pooled == workspace.pooled_bytes());
            pooled = workspace.pooled_bytes();
        }
        Outcome {
            loss: sums.read().expect("sums").loss.to_bits(),
            gradients: grads.as_slice().iter().map(|g| g.to_bits()).collect(),
            pooled,
        }
    }

    /// Bytes that the planner says the pool holds.
    fn predicted(&self, keep: &[Keep], batch: &PackedBatch) -> u64 {
        let bytes = self.plan(keep, batch).bytes;
        bytes.kept + bytes.working + bytes.loss
    }

    fn plan(&self, keep: &[Keep], batch: &PackedBatch) -> ActivationPlan {
        let (attachments, _) = attach(&self.config, self.adapter.as_ref()).expect("attaches");
        let workload = Workload {
            documents: 1,
            tokens: batch.tokens(),
            label_rows: [batch.trained_tokens()].into(),
            mean_length: 8.0,
            ..Workload::default()
        };
        let dtypes = [self.dtype; 2];
        let shape = StepShape::new(&self.config, &attachments, &self.device, dtypes, &workload);
        shape.with_offloaded(self.offloaded).predict(keep)
    }
}

fn batch(documents: &[Example]) -> PackedBatch {
    PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)))
}

fn shapes() -> [Shape; 2] {
    let plain = Shape {
        layers: LAYERS,
        ..Shape::default()
    };
    [
        Shape {
            bias: true,
            ..plain.clone()
        },
        Shape {
            tied: true,
            heads: 3,
            kv_heads: 1,
            head_dim: 12,
            intermediate: 72,
            vocab: 131,
            ..plain
        },
    ]
}

/// One method on both shapes, in f32 and bf16, on many documents and on none: the same bits for every
/// policy, from exactly the memory that was predicted.
fn assert_same_bits(device: &Device, method: fn() -> Box<dyn Adapter>) {
    for shape in shapes() {
        let directory = tempfile::tempdir().expect("temporary directory");
        write_model(directory.path(), &shape, Stored::F32, SEED);
        let documents = examples(4, shape.vocab, SEED);
        for dtype in [DType::F32, DType::Bf16] {
            let mut subject = Subject::new(directory.path(), method(), device, dtype);
            for batch in [batch(&documents), batch(&[])] {
                let label = format!(
                    "{} {dtype} T={}",
                    subject.adapter.describe(),
                    batch.tokens()
                );
                let all = subject.run(&[], &batch);
                assert_eq!(all.pooled as u64, subject.predicted(&[], &batch), "{label}");
                if batch.tokens() > 0 {
                    assert!(all.gradients.iter().any(|g| f32::from_bits(*g) != 0.0));
                }
                for keep in policies() {
                    let other = subject.run(&keep, &batch);
                    let label = format!("{label}, {keep:?}");
                    assert_eq!(other.loss, all.loss, "loss of {label}");
                    assert!(other.gradients == all.gradients, "gradients of {label}");
                    let predicted = subject.predicted(&keep, &batch);
                    assert_eq!(other.pooled as u64, predicted, "{label}");
                }
                for (layers, keep) in [(LAYERS - 2, &[] as &[Keep]), (LAYERS, &MIXED)] {
                    assert_same_bits_offloaded(&mut subject, layers, keep, &batch, &all);
                }
            }
        }
    }
}

/// The same with what the first `layers` keep in host memory; on a CPU there as ever.
fn assert_same_bits_offloaded(
    subject: &mut Subject,
    layers: usize,
    keep: &[Keep],
    batch: &PackedBatch,
    all: &Outcome,
) {
    if !subject.device.is_cuda() {
        return;
    }
    subject.model.set_offload(layers).expect("a side stream");
    subject.offloaded = layers;
    let other = subject.run(keep, batch);
    let plan = subject.plan(keep, batch);
    let method = subject.adapter.describe();
    let label = format!(
        "{method} {} T={}, {layers} offloaded, {keep:?}",
        subject.dtype,
        batch.tokens()
    );
    assert_eq!(other.loss, all.loss, "loss of {label}");
    assert!(other.gradients == all.gradients, "gradients of {label}");
    let predicted = subject.predicted(keep, batch);
    assert_eq!(other.pooled as u64, predicted, "{label}");
    let held = subject.model.offloaded_bytes() as u64;
    assert_eq!(held, plan.host, "{label}");
    // Layers that backward does not reach keep nothing.
    assert!(
        held > 0 || batch.tokens() == 0 || layers < LAYERS,
        "{label}"
    );
    if layers == LAYERS {
        assert_eq!(plan.bytes.kept, 0, "{label}");
    }
    subject.model.set_offload(0).expect("nothing to make");
    subject.offloaded = 0;
}

/// Every architecture, in bf16 with the policies mixed: the bytes that its own buffers take.
#[test]
fn every_architecture_takes_the_memory_that_is_predicted() {
    let methods: [fn() -> Box<dyn Adapter>; 2] = [lora_with_dropout, || Box::new(FullFineTuning)];
    for (family, device) in Family::ALL
        .into_iter()
        .flat_map(|family| [(family, Device::Cpu), (family, gpu())])
    {
        let shape = Shape {
            layers: LAYERS,
            ..family.shape()
        };
        let directory = tempfile::tempdir().expect("temporary directory");
        write_model(directory.path(), &shape, Stored::F32, SEED);
        let batch = batch(&examples(4, shape.vocab, SEED));
        for method in methods {
            let mut subject = Subject::new(directory.path(), method(), &device, DType::Bf16);
            let all = subject.run(&[], &batch);
            assert!(all.gradients.iter().any(|g| f32::from_bits(*g) != 0.0));
            assert_eq!(
                all.pooled as u64,
                subject.predicted(&[], &batch),
                "{family:?}"
            );
            for keep in &policies()[2..3] {
                let other = subject.run(keep, &batch);
                let label = format!("{family:?} on {device:?}, {keep:?}");
                assert_eq!(other.loss, all.loss, "loss of {label}");
                assert!(other.gradients == all.gradients, "gradients of {label}");
                let predicted = subject.predicted(keep, &batch);
                assert_eq!(other.pooled as u64, predicted, "{label}");
            }
            assert_same_bits_offloaded(&mut subject, LAYERS, &[], &batch, &all);
        }
    }
}

fn gpu() -> Device {
    Device::Cuda(host_cuda::device())
}

#[test]
fn lora_with_dropout_has_the_same_bits_whatever_is_kept() {
    assert_same_bits(&Device::Cpu, lora_with_dropout);
}

#[test]
fn lora_with_dropout_has_the_same_bits_whatever_is_kept_on_a_gpu() {
    assert_same_bits(&gpu(), lora_with_dropout);
}

#[test]
fn dora_has_the_same_bits_whatever_is_kept() {
    for device in [Device::Cpu, gpu()] {
        assert_same_bits(&device, dora_with_dropout);
    }
}

#[test]
fn methods_with_dropout_have_the_same_bits_whatever_is_kept() {
    let methods: [fn() -> Box<dyn Adapter>; 3] = [
        || method(json!({"peft_type": "HIRA", "r": 3, "hira_dropout": 0.3})),
        || method(json!({"peft_type": "DELORA", "r": 3, "module_dropout": 0.3})),
        || method(json!({"peft_type": "LOHA", "r": 3, "rank_dropout": 0.3, "module_dropout": 0.3})),
    ];
    for method in methods {
        assert_same_bits(&Device::Cpu, method);
    }
    assert_same_bits(&gpu(), methods[0]);
}

#[test]
fn layers_before_the_first_trained_one_keep_nothing() {
    for device in [Device::Cpu, gpu()] {
        assert_same_bits(&device, lora_on_later_layers);
    }
}

#[test]
fn full_fine_tuning_has_the_same_bits_whatever_is_kept() {
    for device in [Device::Cpu, gpu()] {
        assert_same_bits(&device, || Box::new(FullFineTuning));
    }
}

#[test]
fn a_method_of_ones_own_has_the_same_bits_whatever_is_kept() {
    assert_same_bits(&Device::Cpu, || Box::new(OutputScaling));
}

#[test]
fn less_kept_is_less_memory() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let shape = shapes()[0].clone();
    write_model(directory.path(), &shape, Stored::F32, SEED);
    let batch = batch(&examples(3, shape.vocab, SEED));
    let mut subject = Subject::new(
        directory.path(),
        lora_with_dropout(),
        &Device::Cpu,
        DType::F32,
    );
    let pooled = Keep::EVERY.map(|keep| subject.run(&[keep; LAYERS], &batch).pooled);
    assert!(pooled.is_sorted_by(|a, b| a > b), "{pooled:?}");
}
