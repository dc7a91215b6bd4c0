//! Several ranks train what one rank trains. Ranks are threads here; processes are in `launch.rs`.

mod common;

use common::{Shape, Workbench, entries, read, read_json, tensors};
use ferrotune::core::config::{self, TrainConfig};
use ferrotune::core::data::PackedBatch;
use ferrotune::core::process_group::{Place, ProcessGroup, Solo};
use ferrotune::core::trainer::{RunOutcome, StepData};
use ferrotune::core::{Error, Result};
use ferrotune::dist::Local;
use ferrotune::recipe::{EpochData, Recipe};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The same four micro-batches a step, on one, two and four ranks.
const SPLITS: [(usize, usize); 3] = [(1, 4), (2, 2), (4, 1)];

fn load(bench: &Workbench, name: &str, changes: &Value) -> TrainConfig {
    config::load(&bench.config(name, changes), &[]).expect("valid")
}

fn with(changes: &Value, more: &Value) -> Value {
    let mut all = changes.clone();
    let more = more.as_object().expect("an object").clone();
    all.as_object_mut().expect("an object").extend(more);
    all
}

/// `body` on every rank of `world`.
fn on_ranks<R: Send>(
    world: usize,
    body: impl Fn(Place, Box<dyn ProcessGroup>) -> R + Sync,
) -> Vec<R> {
    let groups: Vec<Box<dyn ProcessGroup>> = if world == 1 {
        vec![Box::new(Solo)]
    } else {
        let timeout = Duration::from_secs(120);
        let groups = Local::group(world, timeout).into_iter();
        groups
            .map(|g| Box::new(g) as Box<dyn ProcessGroup>)
            .collect()
    };
    let body = &body;
    std::thread::scope(|scope| {
        let threads: Vec<_> = groups
            .into_iter()
            .map(|group| {
                let place = Place {
                    rank: group.rank(),
                    world_size: world,
                    local_rank: group.rank(),
                    local_world_size: 1,
                };
                scope.spawn(move || body(place, group))
            })
            .collect();
        let joined = threads
            .into_iter()
            .map(|t| t.join().expect("a rank panicked"));
        joined.collect()
    })
}

/// A whole run into `name` on `world` ranks.
fn train(
    bench: &Workbench,
    name: &str,
    world: usize,
    changes: &Value,
    stop: &AtomicBool,
) -> Vec<Result<RunOutcome>> {
    let config = load(bench, name, changes);
    on_ranks(world, |place, group| {
        Recipe::prepare_at(place, config.clone())?.train_with(group, &mut [], stop)
    })
}

fn finish(bench: &Workbench, name: &str, world: usize, changes: &Value) {
    for outcome in train(bench, name, world, changes, &AtomicBool::new(false)) {
        assert!(
            matches!(outcome, Ok(RunOutcome::Finished(_))),
            "{outcome:?}"
        );
    }
}

/// Gradient of the first step on each rank.
fn first_gradient(bench: &Workbench, world: usize, changes: &Value) -> Vec<Vec<f32>> {
    let config = load(bench, "gradient", changes);
    on_ranks(world, |place, group| {
        let recipe = Recipe::prepare_at(place, config.clone()).expect("sound");
        let mut trainer = recipe.trainer_with(group).expect("trainer");
        let hidden = recipe.decoder.hidden_size;
        let mut data = EpochData::new(&recipe.config, &recipe.dataset, hidden, place);
        let batches = data.step(0).expect("rows");
        trainer.step(&batches, 1e-3).expect("step");
        trainer.grads().as_slice().to_vec()
    })
}

fn norm_relative<'a>(
    a: impl IntoIterator<Item = &'a f32>,
    b: impl IntoIterator<Item = &'a f32>,
) -> f64 {
    let (mut difference, mut size) = (0.0, 0.0);
    for (a, b) in a.into_iter().zip(b) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        difference += (a - b) * (a - b);
        size += b * b;
    }
    (difference / size).sqrt()
}

fn changes() -> Value {
    json!({
        "lora_dropout": 0.1,
        "lora_target_modules": "all-linear",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 3,
        "max_steps": 20,
        "replica_check_steps": 5,
    })
}

fn bench() -> Workbench {
    Workbench::of(
        &Shape {
            gain: 1.4,
            ..Shape::default()
        },
        101,
    )
}

#[test]
fn one_two_and_four_ranks_train_the_same_adapter() {
    let bench = bench();
    let mut whole: Option<(Vec<f32>, Vec<f32>)> = None;
    for (world, accumulation) in SPLITS {
        let accumulate = json!({"gradient_accumulation_steps": accumulation});
        let changes = with(&changes(), &accumulate);
        let gradients = first_gradient(&bench, world, &changes);
        let same = |g: &Vec<f32>| {
            g.iter()
                .zip(&gradients[0])
                .all(|(a, b)| a.to_bits() == b.to_bits())
        };
        assert!(gradients.iter().all(same), "ranks hold different gradients");
        let name = format!("ranks_{world}");
        finish(&bench, &name, world, &changes);
        let file = bench.path(&name).join("adapter_model.safetensors");
        let adapter: Vec<f32> = tensors(&file).into_values().flatten().collect();
        let (gradient, trained) =
            whole.get_or_insert_with(|| (gradients[0].clone(), adapter.clone()));
        let error = norm_relative(&gradients[0], &*gradient);
        assert!(
            error <= 1e-6,
            "{world} ranks: first gradient differs by {error:.1e}"
        );
        let error = norm_relative(&adapter, &*trained);
        assert!(
            error <= 1e-4,
            "{world} ranks: adapter differs by {error:.1e}"
        );
        assert_eq!(
            read_json(&bench.path(&name).join("run.json"))["world_size"],
            world
        );
    }
}

#[test]
fn a_deterministic_reduction_gives_the_same_bytes_for_any_number_of_ranks() {
    let bench = bench();
    let changes = with(
        &changes(),
        &json!({"deterministic_reduction": true, "max_steps": 12}),
    );
    for (world, accumulation) in SPLITS {
        let accumulate = json!({"gradient_accumulation_steps": accumulation});
        finish(
            &bench,
            &format!("ranks_{world}"),
            world,
            &with(&changes, &accumulate),
        );
    }
    let bytes = |world| {
        let output = bench.path(&format!("ranks_{world}"));
        read(&output.join("adapter_model.safetensors"))
    };
    assert!(bytes(1) == bytes(2) && bytes(1) == bytes(4));
    let history = |world| {
        let state = read_json(
            &bench
                .path(&format!("ranks_{world}"))
                .join("trainer_state.json"),
        );
        let rows = state["log_history"].as_array().expect("a list").clone();
        let kept = rows
            .iter()
            .map(|r| json!([r["loss"], r["grad_norm"], r["num_tokens"]]));
        kept.collect::<Value>()
    };
    assert_eq!(history(1), history(4));
}

#[test]
fn every_row_is_used_once_per_epoch_and_no_rank_runs_short() {
    let bench = bench();
    for (world, packing) in [(2, false), (3, false), (4, false), (3, true)] {
        let changes = json!({
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 5,
            "packing": packing,
            "max_length": 64,
        });
        let config = load(&bench, "rows", &changes);
        let per_rank = on_ranks(world, |place, _| {
            let recipe = Recipe::prepare_at(place, config.clone()).expect("sound");
            let hidden = recipe.decoder.hidden_size;
            let mut data = EpochData::new(&recipe.config, &recipe.dataset, hidden, place);
            let steps = recipe.plan.steps_per_epoch;
            // Two epochs.
            (0..2 * steps)
                .map(|step| data.step(step).expect("rows"))
                .collect::<Vec<Vec<PackedBatch>>>()
        });
        let steps = per_rank[0].len();
        for epoch in [0..steps / 2, steps / 2..steps] {
            let mut rows = 0;
            for step in epoch {
                let count = per_rank[0][step].len();
                assert!(
                    per_rank.iter().all(|r| r[step].len() == count),
                    "step {step}"
                );
                let batches = per_rank.iter().flat_map(|r| &r[step]);
                rows += batches.map(PackedBatch::sequences).sum::<usize>();
            }
            assert_eq!(rows, 101, "{world} ranks");
        }
    }
}

#[test]
fn a_last_step_with_fewer_rows_than_ranks_trains_as_on_one_rank() {
    let bench = Workbench::new(101);
    // 101 rows in steps of 12: the last step of the epoch has 5 rows, one of four ranks none.
    let changes = json!({"per_device_train_batch_size": 3, "num_train_epochs": 1, "max_steps": -1});
    let accumulated = with(&changes, &json!({"gradient_accumulation_steps": 4}));
    finish(&bench, "one", 1, &accumulated);
    finish(&bench, "four", 4, &changes);
    let state = |name: &str| read_json(&bench.path(name).join("trainer_state.json"));
    assert_eq!(state("one")["global_step"], 9);
    assert_eq!(state("four")["global_step"], 9);
    assert_eq!(
        state("one")["num_input_tokens_seen"],
        state("four")["num_input_tokens_seen"]
    );
    let adapter = |name: &str| -> Vec<f32> {
        let file = bench.path(name).join("adapter_model.safetensors");
        tensors(&file).into_values().flatten().collect()
    };
    let error = norm_relative(&adapter("four"), &adapter("one"));
    assert!(error <= 1e-4, "{error:.1e}");
}

#[test]
fn evaluation_is_shared_and_counts_every_row_once() {
    let bench = Workbench::new(23);
    let changes = json!({
        "eval_file": bench.path("rows.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "per_device_eval_batch_size": 2,
    });
    let one = with(&changes, &json!({"gradient_accumulation_steps": 3}));
    finish(&bench, "one", 1, &one);
    finish(&bench, "three", 3, &changes);
    let results = |name: &str| read_json(&bench.path(name).join("eval_results.json"));
    let (one, three) = (results("one"), results("three"));
    let loss = |v: &Value| v["eval_loss"].as_f64().expect("a number");
    assert!(
        (loss(&one) - loss(&three)).abs() <= 1e-5 * loss(&one),
        "{one} {three}"
    );
    assert_eq!(one["eval_num_tokens"], three["eval_num_tokens"]);
}

#[test]
fn ranks_lose_patience_together() {
    let bench = Workbench::new(23);
    // More loss is better, and training makes less of it.
    let changes = json!({
        "eval_file": bench.path("rows.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 9,
        "learning_rate": 1e-2,
        "greater_is_better": true,
        "early_stopping_patience": 2,
        "load_best_model_at_end": true,
    });
    for outcome in train(&bench, "three", 3, &changes, &AtomicBool::new(false)) {
        let Ok(RunOutcome::Finished(finished)) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(finished.step, 3);
    }
    let state = read_json(&bench.path("three").join("trainer_state.json"));
    assert_eq!(state["best_global_step"], 1);
}

#[test]
fn one_rank_asked_to_stop_stops_all_at_the_same_step_with_a_checkpoint() {
    let bench = bench();
    let changes = with(&changes(), &json!({"max_steps": 5000, "logging_steps": 1}));
    let (stop, never) = (AtomicBool::new(false), AtomicBool::new(false));
    let config = load(&bench, "stopped", &changes);
    let outcomes = on_ranks(3, |place, group| {
        let recipe = Recipe::prepare_at(place, config.clone()).expect("sound");
        // Only the last rank is asked, after a while.
        let flag = if place.rank == 2 { &stop } else { &never };
        std::thread::scope(|scope| {
            if place.rank == 2 {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(300));
                    stop.store(true, Ordering::SeqCst);
                });
            }
            recipe.train_with(group, &mut [], flag)
        })
    });
    let mut steps = Vec::new();
    for outcome in outcomes {
        let Ok(RunOutcome::Stopped {
            step,
            checkpoint: Some(path),
        }) = outcome
        else {
            panic!("{outcome:?}");
        };
        assert!(path.join("adapter_model.safetensors").is_file());
        steps.push(step);
    }
    assert!(steps.iter().all(|s| *s == steps[0]), "{steps:?}");
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let bench = bench();
    let base = with(
        &changes(),
        &json!({
            "deterministic_reduction": true,
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 3,
            "resume_from_checkpoint": "auto",
        }),
    );
    let on =
        |accumulation: usize| with(&base, &json!({"gradient_accumulation_steps": accumulation}));
    finish(&bench, "whole", 1, &on(4));
    // As if killed after the checkpoint of step 3.
    let (from, to) = (bench.path("whole"), bench.path("moved"));
    common::copy_dir(&from.join("checkpoint-3"), &to.join("checkpoint-3"));
    finish(&bench, "moved", 4, &on(1));
    let adapter = |name: &str| read(&bench.path(name).join("adapter_model.safetensors"));
    assert!(adapter("whole") == adapter("moved"));

    // Another number of micro-batches a step is another run, and says so.
    let again = bench.path("refused");
    common::copy_dir(&from.join("checkpoint-3"), &again.join("checkpoint-3"));
    let refused = train(&bench, "refused", 2, &on(1), &AtomicBool::new(false));
    let message = refused[0].as_ref().expect_err("refused").to_string();
    assert!(message.contains("micro_batches_per_step"), "{message}");
    assert!(matches!(refused[1], Err(Error::Transient { .. })));
    assert_eq!(entries(&again), ["checkpoint-3"]);
}

#[test]
fn parameters_that_differ_between_ranks_are_found() {
    let bench = Workbench::new(8);
    let config = load(&bench, "flipped", &json!({}));
    let errors = on_ranks(3, |place, group| {
        let recipe = Recipe::prepare_at(place, config.clone()).expect("sound");
        let mut trainer = recipe.trainer_with(group).expect("trainer");
        trainer.check_replicas().expect("equal at first");
        if place.rank == 1 {
            let values = trainer.params_mut().as_mut_slice();
            values[5] = f32::from_bits(values[5].to_bits() ^ 1);
        }
        trainer
            .check_replicas()
            .expect_err("one bit differs")
            .to_string()
    });
    assert!(
        errors.iter().all(|e| e.contains("rank 1 differ")),
        "{errors:?}"
    );
}

#[test]
fn an_error_of_rank_0_ends_the_others() {
    let bench = Workbench::new(8);
    // Nothing can be written where a file is.
    std::fs::write(bench.path("taken"), "a file").expect("writable");
    let changes = json!({"output_dir": bench.path("taken").join("below")});
    let config = load(&bench, "config", &changes);
    let outcomes = on_ranks(2, |place, group| {
        Recipe::prepare_at(place, config.clone())?.train_with(
            group,
            &mut [],
            &AtomicBool::new(false),
        )
    });
    assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
    assert!(!Path::new(&bench.path("config")).exists());
}
