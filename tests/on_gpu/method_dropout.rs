//! Dropout of the methods beside LoRA: in training what PEFT's modules make of the same masks, elsewhere nothing.

use crate::common;
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::io::{ModelFiles, SafetensorsFile};
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune::core::params::FlatBuffer;
use ferrotune::core::process_group::Solo;
use ferrotune::core::trainer::{Trainer, TrainerOptions, attach};
use ferrotune::kernels::linear_cross_entropy::Accumulator;
use ferrotune::kernels::{DType, Device, Workspace, host_cuda};
use ferrotune::lora::{PeftConfig, load};
use serde_json::{Value, json};
use std::path::PathBuf;

const CASES: [&str; 17] = [
    "adalora",
    "adalora_head",
    "boft",
    "delora",
    "hira",
    "hira_head",
    "loha",
    "loha_head",
    "lokr",
    "lokr_scaled",
    "miss",
    "miss_head",
    "miss_mini",
    "oft",
    "randlora",
    "vblora",
    "vera",
];
/// What the cases were recorded with.
const RECORDED: Mode = Mode::Train { seed: 3, step: 2 };
/// Sums of f32 in another order.
const LOSS: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;

fn fixtures() -> PathBuf {
    common::root().join("tests/fixtures")
}

fn base() -> PathBuf {
    fixtures().join("golden/adapters/_bases/llama")
}

fn documents() -> Vec<Example> {
    let document = |n: u32| {
        let ids: Vec<u32> = (0..n).map(|i| (i * 37 + n) % 250).collect();
        Example {
            labels: ids.iter().map(|&id| id as i32).collect(),
            input_ids: ids,
        }
    };
    [11, 7].map(document).into()
}

fn batch() -> PackedBatch {
    PackedBatch::pack((0..).zip(&documents()))
}

/// A recorded adapter on its base.
struct Subject {
    model: Model,
    params: FlatBuffer,
    device: Device,
}

impl Subject {
    fn new(case: &str, device: &Device) -> Self {
        let directory = fixtures().join("method_dropout").join(case);
        let config = DecoderConfig::open(&base()).expect("config");
        let files = ModelFiles::open(base()).expect("weights");
        let adapter = load(&directory, &config).expect("an adapter of PEFT");
        let (attachments, mut params) = attach(&config, adapter.as_ref()).expect("attaches");
        params.move_to(device);
        let model = Model::load(&config, attachments, &files, &mut params, DType::F32);
        let mut model = model.expect("loads");
        adapter.prepare(&mut params, &mut model).expect("prepared");
        adapter.load(&mut params, &directory).expect("tensors");
        Self {
            model,
            params,
            device: device.clone(),
        }
    }

    fn loss_and_gradients(&self, mode: Mode) -> (f64, FlatBuffer) {
        let workspace = Workspace::on(self.device.clone(), batch().tokens());
        let pass = Pass {
            workspace: &workspace,
            dtype: DType::F32,
            mode,
        };
        let mut grads = FlatBuffer::zeros_on(self.params.layout(), &self.device);
        let mut sums = Accumulator::new(&self.device);
        self.model
            .loss_and_gradients(pass, &self.params, &mut grads, &batch(), &mut sums)
            .expect("runs");
        (sums.read().expect("sums").loss, grads)
    }
}

#[test]
fn loss_and_gradients_are_those_of_peft_with_the_same_masks() {
    for case in CASES {
        let expected = fixtures().join("method_dropout").join(case);
        let expected = SafetensorsFile::open(expected.join("expected.safetensors"));
        let expected = expected.expect("fixture");
        for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
            let subject = Subject::new(case, &device);
            let (loss, grads) = subject.loss_and_gradients(RECORDED);
            let theirs = f64::from(expected.read_f32("loss").expect("f32")[0]);
            assert!(
                (loss - theirs).abs() < LOSS * theirs,
                "{case} on {device:?}: loss {loss}, PEFT {theirs}"
            );
            for name in expected.names().filter(|name| *name != "loss") {
                let id = grads.layout().find(name);
                let id = id.unwrap_or_else(|| panic!("{case}: {name} is not trained"));
                let (ours, theirs) = (grads.get(id), expected.read_f32(name).expect("f32"));
                let most = theirs
                    .iter()
                    .fold(0.0_f64, |m, g| m.max(f64::from(g.abs())));
                let pairs = ours.iter().zip(&theirs);
                let error = pairs.fold(0.0_f64, |m, (a, b)| m.max(f64::from((a - b).abs())));
                assert!(
                    error <= GRADIENT * most,
                    "{case} on {device:?}: {name} is off by {error} of {most}"
                );
            }
        }
    }
}

#[test]
fn masks_differ_by_seed_and_step_and_there_are_none_in_evaluation() {
    for case in CASES {
        let subject = Subject::new(case, &Device::Cpu);
        let loss = |mode| subject.loss_and_gradients(mode).0;
        let first = loss(RECORDED);
        assert_eq!(loss(RECORDED).to_bits(), first.to_bits(), "{case}");
        let plain = loss(Mode::Eval);
        assert!(
            (plain - first).abs() > 1e-4 * plain,
            "{case}: nothing is dropped"
        );
        // A step may draw what another did, where few numbers are drawn.
        let others = (3..6).map(|step| Mode::Train { seed: 3, step });
        let others = others.chain((4..7).map(|seed| Mode::Train { seed, step: 2 }));
        let other = others.filter(|mode| loss(*mode).to_bits() != first.to_bits());
        assert!(other.count() >= 4, "{case}");
    }
}

/// With a dropout of 0 in its place, the adapter is the same in evaluation.
#[test]
fn evaluation_and_merging_know_no_dropout() {
    for case in CASES {
        let subject = Subject::new(case, &Device::Cpu);
        let directory = fixtures().join("method_dropout").join(case);
        let place = tempfile::tempdir().expect("temporary directory");
        let merged = place.path().join("merged");
        let options = ferrotune::lora::MergeOptions::default();
        ferrotune::lora::merge(&base(), &directory, &merged, &options).expect("merges");
        let config = DecoderConfig::open(&merged).expect("config");
        let files = ModelFiles::open(&merged).expect("weights");
        let mut none = FlatBuffer::zeros(&Default::default());
        let model = Model::load(&config, Vec::new(), &files, &mut none, DType::F32);
        let merged = Subject {
            model: model.expect("loads"),
            params: none,
            device: Device::Cpu,
        };
        let loss = subject.loss_and_gradients(Mode::Eval).0;
        let (of_merged, _) = merged.loss_and_gradients(Mode::Eval);
        assert!(
            (loss - of_merged).abs() < LOSS * loss,
            "{case}: {loss} {of_merged}"
        );
    }
}

fn configurations() -> Vec<Value> {
    let of = |mut keys: Value| {
        keys["target_modules"] = json!(["q_proj", "v_proj", "down_proj"]);
        keys
    };
    [
        json!({"peft_type": "BOFT", "boft_block_size": 4, "boft_dropout": 0.3}),
        json!({"peft_type": "DELORA", "r": 4, "module_dropout": 0.3}),
        json!({"peft_type": "HIRA", "r": 4, "hira_dropout": 0.3}),
        json!({"peft_type": "LOHA", "r": 3, "rank_dropout": 0.3, "module_dropout": 0.2}),
        json!({"peft_type": "LOKR", "r": 2, "rank_dropout": 0.3, "rank_dropout_scale": true}),
        json!({"peft_type": "MISS", "r": 6, "miss_dropout": 0.3}),
        json!({"peft_type": "OFT", "oft_block_size": 8, "module_dropout": 0.5}),
        json!({"peft_type": "RANDLORA", "r": 5, "randlora_dropout": 0.3}),
    ]
    .map(of)
    .into()
}

fn trainer(keys: &Value) -> Trainer {
    let object = keys.as_object().expect("an object");
    let config = PeftConfig::from_config("peft_config", object).expect("a known method");
    let adapter: Box<dyn Adapter> = config
        .for_base(&base())
        .into_adapter("llama")
        .expect("valid");
    let config = DecoderConfig::open(&base()).expect("config");
    let files = ModelFiles::open(base()).expect("weights");
    let options = TrainerOptions::default();
    Trainer::new(&config, &files, adapter, Box::new(Solo), options).expect("fits")
}

#[test]
fn a_run_that_stopped_goes_on_to_the_same_bits() {
    for keys in configurations() {
        let run = |trainer: &mut Trainer, steps: usize| {
            for _ in 0..steps {
                trainer.step(&[batch()], 1e-2).expect("a step");
            }
        };
        let (mut whole, mut first, mut second) = (trainer(&keys), trainer(&keys), trainer(&keys));
        run(&mut whole, 6);
        run(&mut first, 2);
        second.restore(2, first.params(), &first.state());
        run(&mut second, 4);
        assert_eq!(
            second.params().as_slice(),
            whole.params().as_slice(),
            "{keys}"
        );
    }
}

/// One micro-batch or two: what is left out follows the step, and what is dropped the document.
#[test]
fn gradients_do_not_depend_on_the_split() {
    for keys in configurations() {
        let documents = documents();
        let gradient = |batches: &[PackedBatch]| {
            let mut trainer = trainer(&keys);
            common::add_noise(trainer.params_mut(), 7);
            trainer.step(batches, 0.0).expect("a step");
            trainer.grads().as_slice().to_vec()
        };
        let whole = gradient(&[batch()]);
        let each = (0..).zip(&documents);
        let apart: Vec<PackedBatch> = each.map(|pair| PackedBatch::pack([pair])).collect();
        let apart = gradient(&apart);
        let size: f64 = whole.iter().map(|g| f64::from(*g).powi(2)).sum();
        let error = whole
            .iter()
            .zip(&apart)
            .map(|(a, b)| f64::from(a - b).powi(2));
        let error = (error.sum::<f64>() / size).sqrt();
        assert!(size > 0.0 && error < 1e-5, "{keys}: {error}");
    }
}
