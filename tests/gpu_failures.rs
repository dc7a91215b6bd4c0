//! What fails on a GPU ends a run with its exit code and a message that says what to do, and leaves the last
//! checkpoint, from which a run goes on to the bytes of one that nothing happened to.
//!
//! The stand-in for a GPU fails on request; a real one does not.

mod common;

use common::{
    Finished, Shape, Stored, Workbench, command, entries, examples, read, text, write_model,
};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::data::PackedBatch;
use ferrotune::core::full::FullFineTuning;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::DecoderConfig;
use ferrotune::core::process_group::Solo;
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::kernels::cuda::CudaDevice;
use ferrotune::kernels::{Device, host_cuda};
use ferrotune::lora::{InitLoraWeights, LoraAdapter, LoraConfig, PeftConfig};
use serde_json::{Value, json};
use std::path::Path;

const FAIL: &str = "FERROTUNE_HOST_FAIL";
const FILE: &str = "adapter_model.safetensors";
/// More waits than a run of these tests has.
const MOST: usize = 100;

/// Whether failures can be asked for.
fn is_stand_in() -> bool {
    let real = common::on_real_gpu();
    if real {
        eprintln!("not run: a GPU does not fail on request, only the stand-in does");
    }
    !real
}

/// A run that goes on from its last checkpoint, without graphs where single launches are to fail.
fn changes(cuda_graph: &str) -> Value {
    json!({"device": "cuda", "resume_from_checkpoint": "auto", "cuda_graph": cuda_graph, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1})
}

/// `ferrotune train` into the directory `name`, with `environment`.
fn train(bench: &Workbench, name: &str, environment: &[(&str, &str)]) -> Finished {
    let cuda_graph = if ["launch", "gemm"].contains(&name) {
        "off"
    } else {
        "auto"
    };
    let config = bench.config(name, &changes(cuda_graph));
    let mut command = command(&["train", text(&config)]);
    command.env("FERROTUNE_CUDA_LIBRARIES", host_cuda::libraries());
    command.envs(environment.iter().copied());
    command.output().expect("the binary starts").into()
}

/// Runs in which the `after`-th `operation` fails with `code`, one for each of `after`, until one ends well.
fn failing(
    bench: &Workbench,
    name: &str,
    (operation, code): (&str, u32),
    after: impl IntoIterator<Item = usize>,
) -> Vec<Finished> {
    let runs = after.into_iter().map(|after| {
        let _ = std::fs::remove_dir_all(bench.path(name));
        let fail = format!("{operation}:{after}:{code}");
        train(bench, name, &[(FAIL, &fail)])
    });
    let failed = runs.take_while(|run| run.code != Some(0));
    failed.collect()
}

/// Names and bytes of all files below `directory`, but for the lock and what a try may log.
fn contents(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for name in entries(directory) {
        let path = directory.join(&name);
        if path.is_dir() {
            let inner = contents(&path).into_iter();
            found.extend(inner.map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else if name != ".ferrotune.lock" {
            found.push((name, read(&path)));
        }
    }
    found
}

/// Wherever a fault comes, also while a checkpoint is read from the GPU, there is none or a whole one, and the same command
/// again goes on to the bytes of a run without faults.
#[test]
fn a_fault_anywhere_in_a_run_leaves_whole_checkpoints() {
    if !is_stand_in() {
        return;
    }
    let bench = Workbench::new(24);
    train(&bench, "whole", &[]).expect(0);
    let whole = read(&bench.path("whole").join(FILE));
    for (operation, code, step, words) in [
        ("sync", 214, 1, "CUDA_ERROR_ECC_UNCORRECTABLE"),
        ("launch", 719, 97, "CUDA_ERROR_LAUNCH_FAILED"),
        ("gemm", 13, 53, "a restart resumes from the last checkpoint"),
    ] {
        let mut met = [false; 2];
        for after in (0..).step_by(step) {
            let failed = failing(&bench, operation, (operation, code), [after]);
            let Some(failed) = failed.first() else {
                break;
            };
            let place = format!("{operation} {after}");
            assert_eq!(failed.code, Some(175), "{place}: {}", failed.stderr);
            assert!(failed.stderr.contains(words), "{place}: {}", failed.stderr);
            met[usize::from(bench.path(operation).join("checkpoint-2").exists())] = true;
            train(&bench, operation, &[]).expect(0);
            let again = read(&bench.path(operation).join(FILE));
            assert!(whole == again, "{place}: other bytes");
        }
        assert_eq!(met, [true; 2], "{operation}: before and after a checkpoint");
    }
}

#[test]
fn what_fails_before_the_first_step_leaves_everything_as_it_is() {
    if !is_stand_in() {
        return;
    }
    let bench = Workbench::new(24);
    train(&bench, "whole", &[]).expect(0);
    let checkpoint = bench.path("out/checkpoint-2");
    let failed = |after| failing(&bench, "out", ("sync", 214), [after]).len() == 1;
    assert!((1..MOST).any(|after| failed(after) && checkpoint.exists()));
    let before = contents(&bench.path("out"));
    // A driver and a compiler, and no library of products.
    let folder = bench.path("libraries");
    std::fs::create_dir(&folder).expect("writable");
    for library in ["libcuda.so.1", "libnvrtc.so.13"] {
        std::fs::copy(host_cuda::libraries().join(library), folder.join(library)).expect("copied");
    }
    let alone = text(&folder);
    // A compiler, and no driver.
    let without_driver = bench.path("compiler");
    std::fs::create_dir(&without_driver).expect("writable");
    let compiler = "libnvrtc.so.13";
    std::fs::copy(folder.join(compiler), without_driver.join(compiler)).expect("copied");
    for (variable, value, code, words) in [
        (FAIL, "copy:5:719", 175, "CUDA_ERROR_LAUNCH_FAILED"),
        // Another process has the memory that a plan has counted on.
        (FAIL, "alloc:5:2:on", 71, "out of memory"),
        (
            FAIL,
            "load:0:222:on",
            78,
            "the driver is too old for these kernels",
        ),
        (FAIL, "load:0:200:on", 78, "the driver is too old"),
        (FAIL, "load:0:209:on", 78, "the driver is too old"),
        // As a GPU of one process at a time answers a second.
        (FAIL, "alloc:0:46:on", 78, "another process has this GPU"),
        (
            "FERROTUNE_HOST_DRIVER",
            "11080",
            78,
            "the driver offers CUDA 11.8, at least 12.0",
        ),
        ("FERROTUNE_CUDA_LIBRARIES", alone, 78, "libcublasLt"),
        (
            "FERROTUNE_CUDA_LIBRARIES",
            text(&without_driver),
            78,
            "libcuda: not found",
        ),
        (
            "FERROTUNE_HOST_CAPABILITY",
            "7.5",
            78,
            "at least 8.0 is needed",
        ),
        ("FERROTUNE_HOST_MEMORY", "65536", 71, "memory"),
    ] {
        let failed = train(&bench, "out", &[(variable, value)]);
        assert_eq!(
            failed.code,
            Some(code),
            "{variable}={value}: {}",
            failed.stderr
        );
        assert!(
            failed.stderr.contains(words),
            "{variable}={value}: {}",
            failed.stderr
        );
        let after = contents(&bench.path("out"));
        let names = |files: &[(String, Vec<u8>)]| -> Vec<String> {
            files.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(names(&before), names(&after), "{variable}={value}");
        assert!(before == after, "{variable}={value}: a file is another one");
    }
    train(&bench, "out", &[]).expect(0);
    let [whole, out] = ["whole", "out"].map(|name| read(&bench.path(name).join(FILE)));
    assert!(whole == out, "other bytes");
}

#[test]
fn two_processes_on_one_gpu_do_not_disturb_each_other() {
    let bench = Workbench::new(24);
    std::thread::scope(|scope| {
        let runs = ["one", "other"].map(|name| {
            let bench = &bench;
            scope.spawn(move || train(bench, name, &[]).expect(0))
        });
        for run in runs {
            run.join().expect("a run");
        }
    });
    let [one, other] = ["one", "other"].map(|name| read(&bench.path(name).join(FILE)));
    assert!(one == other, "other bytes");
}

/// Each way in which the library writes a file of its own.
fn adapters() -> Vec<(String, Box<dyn Adapter>)> {
    let methods = [
        json!({"peft_type": "HRA", "r": 4, "target_modules": ["q_proj"]}),
        json!({"peft_type": "RANDLORA", "r": 3, "target_modules": ["q_proj"]}),
        json!({"peft_type": "LN_TUNING"}),
        json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    ];
    let of = |keys: &Value| {
        let config = PeftConfig::from_config("peft_config", keys.as_object().expect("an object"));
        let adapter = config.expect("a known method").into_adapter("llama");
        (keys.to_string(), adapter.expect("valid"))
    };
    let lora = |start: &str| {
        let config = LoraConfig {
            init_lora_weights: InitLoraWeights::from_name(start).expect("a start"),
            ..LoraConfig::default()
        };
        let adapter = LoraAdapter::new(config, "llama").expect("valid");
        (start.to_owned(), Box::new(adapter) as Box<dyn Adapter>)
    };
    let full: Box<dyn Adapter> = Box::new(FullFineTuning);
    let mut adapters: Vec<_> = methods.iter().map(of).collect();
    adapters.extend(["gaussian", "pissa"].map(lora));
    adapters.push(("full".into(), full));
    adapters
}

#[test]
fn what_a_gpu_could_not_give_is_not_saved() {
    if !is_stand_in() {
        return;
    }
    let base = tempfile::tempdir().expect("temporary directory");
    write_model(base.path(), &Shape::default(), Stored::F32, 24);
    let config = DecoderConfig::open(base.path()).expect("config");
    let files = ModelFiles::open(base.path()).expect("weights");
    let rows = examples(2, Shape::default().vocab, 24);
    let batch = PackedBatch::pack([(0, &rows[0]), (1, &rows[1])]);
    for (name, adapter) in adapters() {
        let ordinal = host_cuda::device().ordinal();
        let options = TrainerOptions {
            device: Device::Cuda(CudaDevice::open(ordinal).expect("opens twice")),
            max_tokens: batch.tokens(),
            ..TrainerOptions::default()
        };
        let trainer = Trainer::new(&config, &files, adapter, Box::new(Solo), options);
        let mut trainer = trainer.unwrap_or_else(|error| panic!("{name}: {error}"));
        let output = tempfile::tempdir().expect("temporary directory");
        let save = |trainer: &Trainer| trainer.adapter().save(trainer.params(), output.path());
        trainer
            .step(std::slice::from_ref(&batch), 1e-2)
            .expect("step");
        save(&trainer).expect("saved");
        let before = contents(output.path());
        trainer
            .step(std::slice::from_ref(&batch), 1e-2)
            .expect("step");
        assert!(host_cuda::inject("copy:0:214"), "the stand-in can fail");
        let error = save(&trainer).map_or_else(|error| error.to_string(), |()| "none".into());
        assert!(
            error.contains("CUDA_ERROR_ECC_UNCORRECTABLE"),
            "{name}: {error}"
        );
        assert!(before == contents(output.path()), "{name}: another file");
    }
}
