//! Optimizers beyond AdamW in whole runs: on a CPU, on a GPU, on several ranks, and where a step fails.

use crate::common;
use crate::common::{Shape, Stored, Workbench, examples, read_json, text, write_model};
use ferrotune::core::Error;
use ferrotune::core::adapter::Adapter;
use ferrotune::core::config::{KeyValue, Optim, OptimArgs, OptimizerArguments};
use ferrotune::core::data::{BatchSize, PackedBatch};
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::DecoderConfig;
use ferrotune::core::process_group::{ProcessGroup, Solo};
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::dist::Local;
use ferrotune::kernels::cuda::CudaDevice;
use ferrotune::kernels::{Device, host_cuda};
use ferrotune::lora::{LoraAdapter, LoraConfig, TargetModules};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// Rank of the adapters: factors of 128 x 32 are large enough for moments in bytes.
const RANK: usize = 128;
/// Large enough for moments in bytes, 256 x 32, in a run where a rank may not be above its matrix.
const LARGE: [&str; 1] = ["lm_head"];
/// What products on a GPU leave of f32, which three steps carry on.
const DEVICES: f64 = 1e-4;

fn base() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    write_model(directory.path(), &Shape::default(), Stored::F32, 3);
    directory
}

/// A base with a table of [`LARGE`].
fn workbench(rows: usize) -> Workbench {
    let bench = Workbench::new(rows);
    let shape = Shape {
        vocab: 256,
        ..Shape::default()
    };
    write_model(&bench.path("base"), &shape, Stored::F32, 1);
    bench
}

fn adapter() -> Box<dyn Adapter> {
    let lora = LoraConfig {
        rank: RANK,
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    };
    Box::new(LoraAdapter::new(lora, "llama").expect("valid"))
}

fn options(optim: &str, device: Device) -> TrainerOptions {
    let momentum = [("momentum".to_owned(), json!(0.9))];
    let arguments = OptimizerArguments {
        optim: Optim::from_value(&json!(optim)).expect("an optimizer"),
        optim_args: OptimArgs(momentum.into_iter().filter(|_| optim == "sgd").collect()),
        ..OptimizerArguments::default()
    };
    TrainerOptions {
        device,
        optimizer: arguments.choice().expect("valid"),
        weight_decay: 0.1,
        max_tokens: 200,
        ..TrainerOptions::default()
    }
}

fn trainer(base: &Path, optim: &str, device: Device, group: Box<dyn ProcessGroup>) -> Trainer {
    let config = DecoderConfig::open(base).expect("config");
    let files = ModelFiles::open(base).expect("weights");
    let options = options(optim, device);
    Trainer::new(&config, &files, adapter(), group, options).expect("trainer")
}

/// The norm of the difference over the norm.
fn apart(ours: &[f32], theirs: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let pairs = ours.iter().zip(theirs);
    let apart = square(&mut pairs.map(|(a, b)| f64::from(a - b)));
    (apart / square(&mut theirs.iter().map(|v| f64::from(*v)))).sqrt()
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
    let bench = workbench(12);
    let rows = [
        ("adamw_8bit", "", 0.01),
        ("paged_adamw_32bit", "", 0.01),
        ("lion_8bit", "", 0.003),
        ("adafactor", "clip_threshold=2", 0.01),
        ("sgd", "momentum=0.9,nesterov=true", 0.5),
        ("rmsprop", "centered=true", 0.003),
        ("adagrad", "", 0.03),
        ("ademamix", "", 0.003),
        ("adamw_torch", "amsgrad=true", 0.01),
        ("nadam", "", 0.01),
        ("muon", "adjust_lr_fn=match_rms_adamw", 0.03),
    ];
    for (optim, args, rate) in rows {
        let changes = &json!({
            "optim": optim,
            "optim_args": args,
            "learning_rate": rate,
            "lora_modules_to_save": LARGE,
            "loraplus_lr_ratio": 2,
            "weight_decay": 0.01,
            "max_steps": 8,
            "per_device_train_batch_size": 12,
        });
        assert_learns(&bench, optim, changes);
    }
}

/// A run of 8 steps ends with a loss well below its first.
#[track_caller]
fn assert_learns(bench: &Workbench, name: &str, changes: &Value) {
    bench.train(name, changes).expect(0);
    let state = read_json(&bench.path(name).join("trainer_state.json"));
    let history = state["log_history"].as_array().expect("a history");
    let losses = history.iter().filter_map(|row| row["loss"].as_f64());
    let losses: Vec<f64> = losses.collect();
    assert_eq!(losses.len(), 8, "{name}");
    assert!(losses[7] < 0.97 * losses[0], "{name}: {losses:?}");
}

#[test]
fn methods_that_see_every_step_learn_with_other_optimizers() {
    let bench = workbench(12);
    let steps = json!({"max_steps": 8, "per_device_train_batch_size": 12, "learning_rate": 0.01});
    let adalora = json!({
        "peft_type": "ADALORA", "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_r": 6, "target_r": 4, "total_step": 8, "tinit": 2, "tfinal": 2,
    });
    let rows = [
        (
            "lora_fa",
            json!({"optim": "adamw_8bit", "use_lora_fa": true, "lora_modules_to_save": LARGE, "learning_rate": 0.1}),
        ),
        (
            "adalora",
            json!({"optim": "rmsprop", "peft_config": adalora}),
        ),
        ("full", json!({"optim": "adafactor", "use_peft": false})),
    ];
    for (name, more) in rows {
        let mut changes = steps.clone();
        let more = more.as_object().expect("an object").clone();
        changes.as_object_mut().expect("an object").extend(more);
        assert_learns(&bench, name, &changes);
    }
}

#[test]
fn a_plan_counts_the_state_of_the_optimizer() {
    let bench = workbench(4);
    let bytes = |optim: &str| {
        let small = json!({
            "optim": optim, "lora_modules_to_save": LARGE, "lora_target_modules": ["q_proj"], "lora_r": 2,
        });
        let config = bench.config(optim, &small);
        let finished = common::ferrotune(&["plan", text(&config), "--json"]).expect(0);
        let plan: Value = serde_json::from_str(&finished.stdout).expect("JSON");
        let number = |value: &Value| value.as_u64().expect("a number");
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
fn a_plan_counts_what_is_saved_beside_what_is_trained() {
    let bench = workbench(4);
    let plan = |save: bool| {
        let randlora = json!({"peft_type": "RANDLORA", "r": 4, "target_modules": ["q_proj"], "save_projection": save});
        let small = json!({"optim": "sgd", "peft_config": randlora});
        let config = bench.config("randlora", &small);
        let finished = common::ferrotune(&["plan", text(&config), "--json"]).expect(0);
        serde_json::from_str::<Value>(&finished.stdout).expect("JSON")
    };
    let bytes = |plan: &Value| plan["checkpoint_bytes"].as_u64().expect("a number");
    let (with, without) = (plan(true), plan(false));
    let trained = without["trainable_parameters"].as_u64().expect("a number");
    assert_eq!(bytes(&without), 4 * trained);
    // A [r, 1, min] and B [max, bases, r], of matrices that are square here.
    let side = common::Shape::default().hidden as u64;
    assert_eq!(bytes(&with) - bytes(&without), 4 * (4 * side + side * side));
}

/// A device of its own: nothing else may use it while a graph is recorded.
fn own_gpu() -> Device {
    Device::Cuda(CudaDevice::open(host_cuda::device().ordinal()).expect("opens twice"))
}

#[test]
fn a_gpu_updates_to_the_values_of_the_host() {
    let base = base();
    for optim in [
        "sgd",
        "adafactor",
        "adamw_8bit",
        "lion_8bit",
        "adagrad",
        "adadelta",
        "adamax",
        "ademamix",
        "nadam",
        "radam",
        "rmsprop",
    ] {
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
        let (host, gpu) = (run(Device::Cpu), run(own_gpu()));
        let apart = apart(&gpu, &host);
        // Its first step is 10 times as long as Adam's, also where a gradient is next to nothing but rounding.
        let most = if optim == "rmsprop" {
            10.0 * DEVICES
        } else {
            DEVICES
        };
        assert!(apart < most, "{optim}: {apart}");
    }
}

#[test]
fn adapters_of_one_run_have_an_optimizer_each() {
    let base = base();
    let config = DecoderConfig::open(base.path()).expect("config");
    let files = ModelFiles::open(base.path()).expect("weights");
    let optims = ["adafactor", "sgd", "adamw_torch"];
    let members = optims.map(|optim| (adapter(), options(optim, Device::Cpu)));
    let together = Trainer::together(&config, &files, members.into()).expect("one base for all");
    let trained: Vec<Trainer> = std::thread::scope(|scope| {
        let threads: Vec<_> = together
            .into_iter()
            .map(|mut trainer| {
                scope.spawn(move || {
                    train(&mut trainer, 3);
                    trainer
                })
            })
            .collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().expect("a member"));
        joined.collect()
    });
    for (optim, together) in optims.into_iter().zip(trained) {
        let mut alone = trainer(base.path(), optim, Device::Cpu, Box::new(Solo));
        train(&mut alone, 3);
        let apart = apart(together.params().as_slice(), alone.params().as_slice());
        assert!(apart < DEVICES, "{optim}: {apart}");
    }
}

#[test]
fn a_step_that_is_not_finite_changes_neither_values_nor_state() {
    let base = base();
    for device in [Device::Cpu, own_gpu()] {
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
