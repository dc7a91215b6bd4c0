//! Same seed, same bytes: whatever the number of threads, and every time.

mod common;

use common::{Shape, Stored, Workbench, read, read_json, write_model};
use serde_json::{Value, json};

/// Wide and long enough that products, attention and the loss are cut into pieces for threads.
fn shape() -> Shape {
    Shape {
        hidden: 128,
        intermediate: 320,
        heads: 8,
        kv_heads: 2,
        head_dim: 16,
        ..Shape::default()
    }
}

/// The bytes of the result, and the log without what a clock measured.
fn result(bench: &Workbench, name: &str, file: &str, changes: &Value) -> (Vec<u8>, Value) {
    bench.train(name, changes).expect(0);
    let state = read_json(&bench.path(name).join("trainer_state.json"));
    let rows = state["log_history"].as_array().expect("a list").clone();
    let losses = rows.iter().filter(|r| r.get("loss").is_some());
    let kept = losses.map(|r| json!([r["step"], r["loss"], r["grad_norm"], r["entropy"]]));
    (read(&bench.path(name).join(file)), kept.collect())
}

fn assert_same_for_all_threads(bench: &Workbench, file: &str, changes: &Value) {
    let run = |name: &str, threads: usize| {
        let mut changes = changes.clone();
        changes["num_threads"] = json!(threads);
        result(bench, name, file, &changes)
    };
    let (bytes, log) = run("one", 1);
    assert!(!log.as_array().expect("a list").is_empty());
    for (name, threads) in [("two", 2), ("three", 3), ("two_again", 2)] {
        let (other_bytes, other_log) = run(name, threads);
        assert_eq!(
            log, other_log,
            "{threads} threads log other numbers than one"
        );
        assert!(
            bytes == other_bytes,
            "{threads} threads write other bytes than one"
        );
    }
}

#[test]
fn an_adapter_has_the_same_bytes_for_any_number_of_threads() {
    let bench = Workbench::of(&shape(), 48);
    let changes = json!({
        "lora_dropout": 0.1,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 2,
    });
    assert_same_for_all_threads(&bench, "adapter_model.safetensors", &changes);
}

#[test]
fn an_adapter_in_bfloat16_has_the_same_bytes_for_any_number_of_threads() {
    let bench = Workbench::of(&shape(), 24);
    write_model(&bench.path("base"), &shape(), Stored::Bf16, 7);
    let changes = json!({"bf16": true, "packing": true, "max_length": 128});
    assert_same_for_all_threads(&bench, "adapter_model.safetensors", &changes);
}

#[test]
fn full_fine_tuning_has_the_same_bytes_for_any_number_of_threads() {
    let bench = Workbench::of(
        &Shape {
            tied: true,
            ..shape()
        },
        24,
    );
    let changes = json!({"use_peft": false, "per_device_train_batch_size": 12});
    assert_same_for_all_threads(&bench, "model.safetensors", &changes);
}

#[test]
fn another_seed_gives_another_adapter() {
    let bench = Workbench::new(16);
    let run = |name: &str, seed: u64| {
        let changes = json!({"seed": seed});
        result(&bench, name, "adapter_model.safetensors", &changes).0
    };
    assert!(run("first", 1) != run("second", 2));
}
