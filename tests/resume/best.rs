//! The best evaluation: which it is, what it keeps, and when waiting for a better one ends.

use super::common::{Workbench, read, read_json};
use super::{checkpoints, with};
use serde_json::{Value, json};

/// More loss is better here, so the first evaluation of a run that learns is the best.
fn worsening(bench: &Workbench, more: &Value) -> Value {
    let mut all = with(
        bench,
        &json!({
            "eval_steps": 1, "save_steps": 100, "learning_rate": 1e-2, "warmup_steps": 0,
            "metric_for_best_model": "eval_loss", "greater_is_better": true,
            "load_best_model_at_end": true, "save_total_limit": 1,
        }),
    );
    let more = more.as_object().expect("an object").clone();
    all.as_object_mut().expect("an object").extend(more);
    all
}

#[test]
fn a_run_ends_when_nothing_gets_better_and_its_result_is_the_best() {
    let bench = Workbench::new(19);
    let patience =
        |evaluations: u64| worsening(&bench, &json!({"early_stopping_patience": evaluations}));
    bench.train("run", &patience(2)).expect(0);
    let output = bench.path("run");
    let losses: Vec<f64> = read_json(&output.join("trainer_state.json"))["log_history"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|row| row["eval_loss"].as_f64())
        .collect();
    assert!(
        losses.len() == 3 && losses[1] < losses[0] && losses[2] < losses[0],
        "{losses:?}"
    );
    // The best was saved out of turn, the last because the run ended; one checkpoint was asked for.
    assert_eq!(checkpoints(&output), ["checkpoint-1", "checkpoint-3"]);
    let state = read_json(&output.join("trainer_state.json"));
    assert_eq!(
        (&state["global_step"], &state["best_global_step"]),
        (&json!(3), &json!(1))
    );
    let best = state["best_model_checkpoint"].as_str().expect("named");
    assert!(best.ends_with("checkpoint-1"), "{best}");
    let adapter = |place: &str| read(&output.join(place).join("adapter_model.safetensors"));
    assert!(adapter("") == adapter("checkpoint-1"));
    assert!(adapter("") != adapter("checkpoint-3"));
    // What it is said to lose is what these weights do, and not those of the last step.
    for file in ["eval_results.json", "all_results.json"] {
        assert_eq!(
            read_json(&output.join(file))["eval_loss"],
            losses[0],
            "{file}"
        );
    }

    // A resume has no more patience than the run had, and leaves its result as it is.
    let results = read(&output.join("train_results.json"));
    bench.train("run", &patience(2)).expect(0);
    assert!(results == read(&output.join("train_results.json")));
    assert!(output.join("run.json").is_file());
    // With more patience it goes on, and the count with it.
    bench.train("run", &patience(4)).expect(0);
    assert_eq!(checkpoints(&output), ["checkpoint-1", "checkpoint-5"]);
    assert!(adapter("") == adapter("checkpoint-1"));
}

#[test]
fn without_patience_the_run_goes_to_its_end_and_back_to_the_best() {
    let bench = Workbench::new(19);
    let changes = worsening(&bench, &json!({"max_steps": 4, "save_strategy": "no"}));
    bench.train("run", &changes).expect(0);
    let output = bench.path("run");
    assert_eq!(
        read_json(&output.join("trainer_state.json"))["global_step"],
        4
    );
    assert_eq!(checkpoints(&output), ["checkpoint-1"]);
    let adapter = |place: &str| read(&output.join(place).join("adapter_model.safetensors"));
    assert!(adapter("") == adapter("checkpoint-1"));
    // Less loss is better: the last step is the best, and nothing is gone back to.
    let less = worsening(&bench, &json!({"max_steps": 4, "greater_is_better": false}));
    bench.train("less", &less).expect(0);
    let state = read_json(&bench.path("less").join("trainer_state.json"));
    assert_eq!(state["best_global_step"], 4);
}
