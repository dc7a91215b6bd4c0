//! Optimizers beyond AdamW in whole runs: on a CPU, on a GPU, on several ranks, and where a step fails.

mod common;

use common::{Shape, Stored, Workbench, examples, read_json, text, write_model};
use ferrotune::core::Error;
use ferrotune::core::config::{KeyValue, Optim, OptimArgs, OptimizerArguments};
use ferrotune::core::data::{BatchSize, PackedBatch};
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::DecoderConfig;
use ferrotune::core::process_group::{ProcessGroup, Solo};
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::dist::Local;
use ferrotune::kernels::{Device, host_cuda};
use ferrotune::lora::{LoraAdapter, LoraConfig, TargetModules};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// Rank of the adapters: factors of 128 x 32 are large enough for moments in bytes.
const RANK: usize = 128;
/// What products on a GPU leave of f32, which three steps carry on.
const DEVICES: f64 = 1e-4;

fn base() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    write_model(directory.path(), &Shape::default(), Stored::F32, 3);
    directory
}

fn trainer(base: &Path, optim: &str, device: Device, group: Box<dyn ProcessGroup>) -> Trainer {
    let lora = LoraConfig {
        rank: RANK,
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    };
    let adapter = Box::new(LoraAdapter::new(lora, "llama").expect("valid"));
    let momentum = [("momentum".to_owned(), json!(0.9))];
    let arguments = OptimizerArguments {
        optim: Optim::from_value(&json!(optim)).expect("an optimizer"),
        optim_args: OptimArgs(momentum.into_iter().filter(|_| optim == "sgd").collect()),
        ..OptimizerArguments::default()
    };
    let options = TrainerOptions {
        device,
        optimizer: arguments.choice().expect("valid"),
        weight_decay: 0.1,
        max_tokens: 200,
        ..TrainerOptions::default()
    };
    let config = DecoderConfig::open(base).expect("config");
    let files = ModelFiles::open(base).expect("weights");
    Trainer::new(&config, &files, adapter, group, options).expect("trainer")
}

fn batch() -> PackedBatch {
    let documents = examples(6, Shape::default().vocab, 5);
    PackedBatch::pack((0..).zip(&documents))
}

fn train(trainer: &mut Trainer, steps: usize) {
    for _ in 0..steps {
        trainer.step(&[batch()], 1e-2).expect("a step");
    }
}

#[test]
fn runs_learn_with_every_kind_of_optimizer() {
    let bench = Workbench::new(12);
    let rows = [
        ("adamw_8bit", "", 0.01),
        ("paged_adamw_32bit", "", 0.01),
        ("lion_8bit", "", 0.003),
        ("adafactor", "scale_parameter=true", 0.1),
        ("sgd", "momentum=0.9,nesterov=true", 0.5),
        ("rmsprop", "centered=true", 0.003),
        ("adagrad", "", 0.03),
        ("ademamix", "", 0.003),
        ("adamw_torch", "amsgrad=true", 0.01),
        ("nadam", "", 0.01),
        ("muon", "adjust_lr_fn=match_rms_adamw", 0.03),
    ];
    for (optim, args, rate) in rows {
        let changes = json!({
            "optim": optim,
            "optim_args": args,
            "learning_rate": rate,
            "lora_r": RANK,
            "loraplus_lr_ratio": 2,
            "weight_decay": 0.01,
            "max_steps": 8,
            "per_device_train_batch_size": 12,
        });
        bench.train(optim, &changes).expect(0);
        let state = read_json(&bench.path(optim).join("trainer_state.json"));
        let history = state["log_history"].as_array().expect("a history");
        let losses: Vec<f64> = history
            .iter()
            .filter_map(|row| row["loss"].as_f64())
            .collect();
        assert_eq!(losses.len(), 8, "{optim}");
        assert!(losses[7] < 0.95 * losses[0], "{optim}: {losses:?}");
    }
}

#[test]
fn a_plan_counts_the_state_of_the_optimizer() {
    let bench = Workbench::new(4);
    let bytes = |optim: &str| {
        let config = bench.config(optim, &json!({"optim": optim, "lora_r": RANK}));
        let finished = common::ferrotune(&["plan", text(&config), "--json"]).expect(0);
        let plan: serde_json::Value = serde_json::from_str(&finished.stdout).expect("JSON");
        let number = |value: &serde_json::Value| value.as_u64().expect("a number");
        [
            number(&plan["memory_bytes"]["trained"]),
            number(&plan["checkpoint_bytes"]),
            number(&plan["trainable_parameters"]),
        ]
    };
    let [adamw, saved, trainable] = bytes("adamw_torch_fused");
    assert_eq!([adamw, saved], [16 * trainable, 12 * trainable]);
    let [eight_bit, saved, _] = bytes("adamw_8bit");
    assert!(eight_bit < 12 * trainable && saved < 8 * trainable);
    assert_eq!(bytes("sgd"), [8 * trainable, 4 * trainable, trainable]);
}

#[test]
fn on_a_gpu_the_host_updates_to_the_same_values() {
    let base = base();
    for optim in ["sgd", "adafactor", "adamw_8bit"] {
        let run = |device: Device| {
            let mut trainer = trainer(base.path(), optim, device, Box::new(Solo));
            let batch = batch();
            let size = BatchSize {
                tokens: batch.tokens(),
                label_rows: batch.trained_tokens(),
                documents: batch.sequences(),
            };
            trainer.rehearse(&[size]).expect("room");
            train(&mut trainer, 3);
            trainer.params().as_slice().to_vec()
        };
        let (host, gpu) = (run(Device::Cpu), run(Device::Cuda(host_cuda::device())));
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let pairs = host.iter().zip(&gpu);
        let apart = square(&mut pairs.map(|(a, b)| f64::from(a - b)));
        let size = square(&mut host.iter().map(|a| f64::from(*a)));
        assert!(
            (apart / size).sqrt() < DEVICES,
            "{optim}: {}",
            (apart / size).sqrt()
        );
    }
}

#[test]
fn a_step_that_is_not_finite_changes_neither_values_nor_state() {
    let base = base();
    for device in [Device::Cpu, Device::Cuda(host_cuda::device())] {
        for optim in ["adamw_8bit", "adafactor", "muon"] {
            let mut trainer = trainer(base.path(), optim, device.clone(), Box::new(Solo));
            train(&mut trainer, 2);
            trainer.params_mut().as_mut_slice()[0] = f32::INFINITY;
            let kept = |trainer: &Trainer| -> (Vec<u32>, Vec<Vec<u8>>) {
                let values = trainer.params().as_slice().iter().map(|v| v.to_bits());
                let state = trainer.state();
                (
                    values.collect(),
                    state.values().map(|tensor| tensor.bytes.to_vec()).collect(),
                )
            };
            let before = kept(&trainer);
            let error = trainer.step(&[batch()], 1e-2).expect_err("not finite");
            assert!(matches!(error, Error::Numeric { .. }), "{optim}: {error}");
            assert!(before == kept(&trainer), "{optim} on {device:?}");
        }
    }
}

#[test]
fn every_rank_takes_the_state_that_the_first_restored() {
    let base = base();
    for optim in ["adamw_8bit", "adafactor", "lion_32bit"] {
        let mut first = trainer(base.path(), optim, Device::Cpu, Box::new(Solo));
        train(&mut first, 2);
        let (params, state) = (first.params(), &first.state());
        let groups = Local::group(2, Duration::from_secs(120));
        let ranks: Vec<Trainer> = std::thread::scope(|scope| {
            let threads: Vec<_> = groups
                .into_iter()
                .map(|group| {
                    let base = base.path();
                    scope.spawn(move || {
                        let rank = group.rank();
                        let mut trainer = trainer(base, optim, Device::Cpu, Box::new(group));
                        if rank == 0 {
                            trainer.restore(2, params, state);
                        }
                        trainer.follow_first_rank().expect("both are there");
                        trainer.step(&[batch()], 1e-2).expect("a step");
                        trainer
                    })
                })
                .collect();
            let joined = threads
                .into_iter()
                .map(|thread| thread.join().expect("a rank"));
            joined.collect()
        });
        let bytes = |trainer: &Trainer| -> Vec<Vec<u8>> {
            let state = trainer.state();
            state.values().map(|tensor| tensor.bytes.to_vec()).collect()
        };
        assert_eq!(
            ranks[0].params().as_slice(),
            ranks[1].params().as_slice(),
            "{optim}"
        );
        assert!(bytes(&ranks[0]) == bytes(&ranks[1]), "{optim}");
        assert!(bytes(&ranks[0]) != bytes(&first), "{optim}");
    }
}
