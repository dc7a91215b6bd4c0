//! The binary on a GPU: the one `FERROTUNE_TEST_DEVICE=cuda` asks for, else the stand-in that runs
//! the same kernels on the host.

use crate::common;
use crate::common::{
    Finished, Shape, Stored, Workbench, command, entries, examples, read, read_json, text,
    write_model,
};
use ferrotune::core::data::PackedBatch;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, Mode, Model, Pass};
use ferrotune::core::trainer::attach;
use ferrotune::kernels::cuda::CudaDevice;
use ferrotune::kernels::{DType, Device, Workspace, host_cuda};
use ferrotune::lora::PeftConfig;
use serde_json::{Value, json};
use std::path::Path;

/// Distance of losses of two devices, whose sums have other orders.
const SAME_LOSS: f64 = 1e-4;
/// The same with bf16 activations on one of them: 8 bits of mantissa.
const BF16_LOSS: f64 = 2e-2;

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Finished {
    let mut command = command(arguments);
    if !common::on_real_gpu() {
        command.env("FERROTUNE_CUDA_LIBRARIES", host_cuda::libraries());
    }
    command.envs(environment.iter().copied());
    command.output().expect("the binary starts").into()
}

fn train(bench: &Workbench, name: &str, device: &str, changes: &Value) -> Finished {
    let mut changes = changes.clone();
    changes["device"] = json!(device);
    let config = bench.config(name, &changes);
    run(&["train", text(&config)], &[])
}

/// Losses and gradient norms of the log, in order.
fn curve(output: &Path) -> Vec<[f64; 2]> {
    let state = read_json(&output.join("trainer_state.json"));
    let history = state["log_history"].as_array().expect("a list");
    let point = |r: &Value| Some([r["loss"].as_f64()?, r["grad_norm"].as_f64()?]);
    history.iter().filter_map(point).collect()
}

fn assert_near(ours: &[[f64; 2]], theirs: &[[f64; 2]], tolerance: f64) {
    assert_eq!(ours.len(), theirs.len());
    assert!(!ours.is_empty());
    for (a, b) in ours.iter().flatten().zip(theirs.iter().flatten()) {
        assert!((a - b).abs() <= tolerance * b.abs(), "{a} and {b}");
    }
}

fn changes() -> Value {
    json!({"max_steps": 6, "lora_dropout": 0.1, "lora_target_modules": "all-linear", "logging_steps": 1})
}

#[test]
fn training_on_a_gpu_is_that_on_the_cpu_and_repeats_itself() {
    let bench = Workbench::new(24);
    for (name, device) in [("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda")] {
        train(&bench, name, device, &changes()).expect(0);
    }
    let [cpu, gpu] = ["cpu", "gpu"].map(|name| curve(&bench.path(name)));
    assert_near(&gpu, &cpu, SAME_LOSS);
    let file = "adapter_model.safetensors";
    let [gpu, again] = ["gpu", "again"].map(|name| read(&bench.path(name).join(file)));
    assert!(gpu == again, "two runs wrote other bytes");
}

#[test]
fn a_resumed_run_has_the_bits_of_the_uninterrupted_one_with_its_algorithms() {
    let bench = Workbench::new(24);
    let mut changes = changes();
    changes["max_steps"] = json!(4);
    changes["save_strategy"] = json!("steps");
    changes["save_steps"] = json!(2);
    changes["gemm_tuning"] = json!("measure");
    train(&bench, "whole", "cuda", &changes).expect(0);
    let whole = bench.path("whole");
    let algorithms = read_json(&whole.join("checkpoint-2/gemm_algorithms.json"));
    assert!(algorithms.as_array().is_some_and(|all| !all.is_empty()));
    changes["resume_from_checkpoint"] = json!(whole.join("checkpoint-2"));
    let resumed = train(&bench, "resumed", "cuda", &changes).expect(0);
    assert!(!resumed.stderr.contains("algorithms"), "{}", resumed.stderr);
    let file = "adapter_model.safetensors";
    let [whole, resumed] = ["whole", "resumed"].map(|name| read(&bench.path(name).join(file)));
    assert!(whole == resumed, "the resumed run wrote other bytes");
}

/// Such a run fails in its first attention, when it has made its directory and taken the lock.
#[test]
fn a_run_that_fails_before_it_writes_anything_leaves_no_new_directory() {
    let bench = Workbench::new(24);
    let shape = common::Shape {
        hidden: 64,
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
        ..common::Shape::default()
    };
    write_model(&bench.path("base"), &shape, Stored::Bf16, 7);
    let output = bench.path("new/out");
    let config = json!({"device": "cuda", "bf16": true, "max_steps": 1, "output_dir": output});
    let config = bench.config("run", &config);
    let fail = || {
        let failed = run(&["train", text(&config)], &[("FERROTUNE_ATTENTION", "foo")]);
        assert_ne!(failed.code, Some(0));
        let said = failed.stderr;
        assert!(said.contains("FERROTUNE_ATTENTION is \"foo\""), "{said}");
    };
    fail();
    assert!(!bench.path("new").exists(), "{:?}", entries(&output));
    // What was there stays.
    std::fs::create_dir_all(&output).expect("writable");
    fail();
    assert!(output.join(".ferrotune.lock").is_file());
}

#[test]
fn a_bf16_base_trains_in_bf16() {
    let bench = Workbench::new(24);
    write_model(
        &bench.path("base"),
        &common::Shape::default(),
        Stored::Bf16,
        7,
    );
    for (name, device) in [("cpu", "cpu"), ("gpu", "cuda")] {
        train(&bench, name, device, &changes()).expect(0);
    }
    let [cpu, gpu] = ["cpu", "gpu"].map(|name| curve(&bench.path(name)));
    let losses = |curve: &[[f64; 2]]| curve.iter().map(|p| [p[0]; 2]).collect::<Vec<_>>();
    assert_near(&losses(&gpu), &losses(&cpu), BF16_LOSS);
}

#[test]
fn a_base_in_4_bits_trains_as_on_the_cpu() {
    let bench = Workbench::new(24);
    let mut changes = changes();
    changes["load_in_4bit"] = json!(true);
    changes["bnb_4bit_use_double_quant"] = json!(true);
    for (name, device) in [("cpu", "cpu"), ("gpu", "cuda")] {
        train(&bench, name, device, &changes).expect(0);
    }
    let [cpu, gpu] = ["cpu", "gpu"].map(|name| curve(&bench.path(name)));
    assert_near(&gpu, &cpu, SAME_LOSS);
}

#[test]
fn answers_of_a_gpu_are_those_of_the_cpu() {
    let bench = Workbench::new(24);
    let base = bench.path("base");
    let answers = ["cpu", "cuda"].map(|device| {
        let base = ["generate", "--model_name_or_path", text(&base)];
        let asked = [
            "--prompt",
            "7",
            "--max_new_tokens",
            "6",
            "--json",
            "--device",
            device,
        ];
        run(&[&base[..], &asked].concat(), &[]).expect(0).stdout
    });
    assert!(!answers[0].is_empty());
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn an_evaluation_on_a_gpu_is_that_on_the_cpu() {
    let bench = Workbench::new(24);
    train(&bench, "out", "cpu", &changes()).expect(0);
    let (base, rows, adapter) = (
        bench.path("base"),
        bench.path("rows.jsonl"),
        bench.path("out"),
    );
    let eval = |device: &str, more: &[&str]| -> Value {
        let of = [
            "eval",
            "--model_name_or_path",
            text(&base),
            "--data",
            text(&rows),
        ];
        let on = ["--adapter", text(&adapter), "--device", device];
        let scored = run(&[&of[..], &on, more].concat(), &[]).expect(0);
        serde_json::from_str(&scored.stdout).expect("JSON")
    };
    let same = |tolerance: f64, more: &[&str]| {
        let [cpu, gpu] = ["cpu", "cuda"].map(|device| eval(device, more));
        let keys = |report: &Value| report.as_object().expect("an object").clone();
        let (cpu, gpu) = (keys(&cpu), keys(&gpu));
        assert!(cpu.contains_key("eval_loss"), "{cpu:?}");
        assert!(cpu.keys().eq(gpu.keys()), "{cpu:?} and {gpu:?}");
        for (key, a) in &cpu {
            // Of two logits that are near, the larger may be the other in bf16.
            if key == "eval_mean_token_accuracy" && tolerance > SAME_LOSS {
                continue;
            }
            let [a, b] = [a, &gpu[key]].map(|value| value.as_f64().expect("a number"));
            assert!(
                (a - b).abs() <= tolerance * a.abs(),
                "{more:?}, {key}: {a} and {b}"
            );
        }
    };
    same(SAME_LOSS, &["--exact_match", "--max_new_tokens", "4"]);
    same(SAME_LOSS, &["--load_in_4bit"]);
    write_model(&bench.path("base"), &Shape::default(), Stored::Bf16, 7);
    same(BF16_LOSS, &["--any_base"]);
}

#[test]
fn a_run_that_does_not_fit_on_the_gpu_is_refused_before_a_weight_is_read() {
    if common::on_real_gpu() {
        eprintln!("not tried: the memory of a real GPU cannot be made small");
        return;
    }
    let bench = Workbench::new(24);
    let mut changes = changes();
    changes["device"] = json!("cuda");
    let config = bench.config("small", &changes);
    let refused = run(
        &["train", text(&config)],
        &[("FERROTUNE_HOST_MEMORY", "65536")],
    );
    let refused = refused.expect(71);
    assert!(
        refused.stderr.contains("are available"),
        "{}",
        refused.stderr
    );
    assert_eq!(entries(&bench.path("small")), Vec::<String>::new());
}

#[test]
fn activations_in_host_memory_change_the_plan_and_no_byte_of_the_result() {
    let shape = Shape {
        layers: 5,
        ..Shape::default()
    };
    let bench = Workbench::of(&shape, 24);
    let plan = |offloading: Value| -> Value {
        let mut changes = changes();
        changes["device"] = json!("cuda");
        changes["activation_offloading"] = offloading;
        let config = bench.config("planned", &changes);
        let finished = run(&["train", "--dry-run", "--json", text(&config)], &[]).expect(0);
        serde_json::from_str(&finished.stdout).expect("JSON")
    };
    let [staying, unset, moved] = [json!(false), Value::Null, json!(true)].map(plan);
    for plan in [&staying, &unset] {
        assert_eq!(plan["activation_plan"]["offloaded_layers"], 0);
        assert_eq!(plan["memory_bytes"]["host_activations"], 0);
    }
    assert_eq!(moved["activation_plan"]["offloaded_layers"], 3);
    let bytes = |plan: &Value, of: &str| plan["memory_bytes"][of].as_u64().expect("bytes");
    // How much depends on what is computed again beside it: copies are slow for layers this small.
    let kept = bytes(&staying, "activations");
    assert!(bytes(&moved, "activations") <= kept * 2 / 5);
    let on_host = bytes(&moved, "host_activations");
    assert!(0 < on_host && on_host <= kept * 3 / 5);
    for (name, offloading) in [("stays", false), ("moves", true)] {
        let mut changes = changes();
        changes["activation_offloading"] = json!(offloading);
        train(&bench, name, "cuda", &changes).expect(0);
    }
    let file = "adapter_model.safetensors";
    let [stays, moves] = ["stays", "moves"].map(|name| read(&bench.path(name).join(file)));
    assert!(stays == moves, "other bytes");
}

#[test]
fn where_a_run_does_not_fit_on_the_gpu_a_plan_moves_activations_to_the_host() {
    const MEMORY: u64 = 1 << 30;
    if common::on_real_gpu() {
        eprintln!("not tried: the memory of a real GPU cannot be made small");
        return;
    }
    let shape = Shape {
        layers: 6,
        ..Shape::default()
    };
    let bench = Workbench::of(&shape, 24);
    let plan = |offloading: Value, memory: u64| {
        let mut changes = changes();
        changes["device"] = json!("cuda");
        changes["gradient_checkpointing"] = json!(true);
        changes["activation_offloading"] = offloading;
        let config = bench.config("planned", &changes);
        let memory = memory.to_string();
        let dry_run = ["train", "--dry-run", "--json", text(&config)];
        run(&dry_run, &[("FERROTUNE_HOST_MEMORY", memory.as_str())])
    };
    let report = |offloading: Value, memory: u64| -> Value {
        serde_json::from_str(&plan(offloading, memory).expect(0).stdout).expect("JSON")
    };
    let on_gpu = |report: &Value| {
        let parts = [
            "weights",
            "trained",
            "activations",
            "working",
            "loss",
            "other",
        ];
        let bytes = parts.map(|part| report["memory_bytes"][part].as_u64().expect("bytes"));
        bytes.into_iter().sum::<u64>()
    };
    let [staying, moved] = [false, true].map(|moves| report(json!(moves), MEMORY));
    assert!(on_gpu(&moved) < on_gpu(&staying));
    let available = staying["available_memory_bytes"].as_u64().expect("bytes");
    let memory = on_gpu(&moved).midpoint(on_gpu(&staying)) + (MEMORY - available);
    plan(json!(false), memory).expect(71);
    let unset = report(Value::Null, memory);
    assert_eq!(unset["activation_plan"]["offloaded_layers"], 4);
    assert_eq!(on_gpu(&unset), on_gpu(&moved));
    // Where it fits as it is, nothing moves.
    assert_eq!(
        report(Value::Null, MEMORY)["activation_plan"]["offloaded_layers"],
        0
    );
}

/// What a method draws and nobody trains is brought to each device that asks for it.
#[test]
fn an_adapter_on_two_devices_has_what_it_draws_on_both() {
    let base = tempfile::tempdir().expect("temporary directory");
    write_model(base.path(), &Shape::default(), Stored::F32, 3);
    let config = DecoderConfig::open(base.path()).expect("config");
    let files = ModelFiles::open(base.path()).expect("weights");
    let row = examples(1, Shape::default().vocab, 3);
    let batch = PackedBatch::pack([(0, &row[0])]);
    for method in [
        json!({"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"], "d_initial": 1.0}),
        json!({"peft_type": "FOURIERFT", "n_frequency": 20, "target_modules": ["q_proj"]}),
    ] {
        let keys = method.as_object().expect("an object");
        let adapter = PeftConfig::from_config("peft_config", keys).expect("a known method");
        let adapter = adapter.into_adapter("llama").expect("valid");
        let loss = |device: Device| {
            let (attachments, mut params) = attach(&config, adapter.as_ref()).expect("attaches");
            adapter.init(&mut params, 3).expect("starts");
            params
                .as_mut_slice()
                .iter_mut()
                .for_each(|value| *value += 0.5);
            params.move_to(&device);
            let model = Model::load(&config, attachments, &files, &mut params, DType::F32);
            let pass = Pass {
                workspace: &Workspace::on(device, batch.tokens()),
                dtype: DType::F32,
                mode: Mode::Eval,
            };
            let sums = model.expect("loads").loss(pass, &params, &batch);
            sums.unwrap_or_else(|error| panic!("{method}: {error}"))
                .loss
        };
        let ordinal = host_cuda::device().ordinal();
        let gpu = || Device::Cuda(CudaDevice::open(ordinal).expect("opens twice"));
        let [cpu, one, other] = [Device::Cpu, gpu(), gpu()].map(loss);
        assert_eq!(one.to_bits(), other.to_bits(), "{method}");
        assert!(
            (one - cpu).abs() <= SAME_LOSS * cpu,
            "{method}: {one} and {cpu}"
        );
    }
}
