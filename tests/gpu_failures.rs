//! What fails on a GPU ends a run with its exit code and a message that says what to do, and leaves the last
//! checkpoint, from which a run goes on to the bytes of one that nothing happened to.
//!
//! The stand-in for a GPU fails on request; a real one does not.

mod common;

use common::{Finished, Workbench, command, entries, read, text};
use ferrotune::kernels::host_cuda;
use serde_json::{Value, json};
use std::path::Path;

const FAIL: &str = "FERROTUNE_HOST_FAIL";
const FILE: &str = "adapter_model.safetensors";
/// More waits than a run of these tests has.
const MOST: usize = 100;

/// Whether failures can be asked for.
fn is_stand_in() -> bool {
    let real = std::env::var("FERROTUNE_TEST_DEVICE").as_deref() == Ok("cuda");
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
        (
            "FERROTUNE_HOST_DRIVER",
            "11080",
            78,
            "the driver offers CUDA 11.8, at least 12.0",
        ),
        ("FERROTUNE_CUDA_LIBRARIES", alone, 78, "libcublasLt"),
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
