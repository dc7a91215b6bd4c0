use super::{LrSchedule, PlateauSchedule, SCHEDULE_NAMES};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Case {
    name: String,
    kwargs: BTreeMap<String, Value>,
    base_lr: f64,
    #[serde(default)]
    warmup: u64,
    #[serde(default)]
    total: u64,
    #[serde(default)]
    lr: Vec<f64>,
    #[serde(default)]
    metrics: Vec<f64>,
    #[serde(default)]
    lr_after_metric: Vec<f64>,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("../../fixtures/schedules.json")).unwrap()
}

fn kwargs(value: Value) -> BTreeMap<String, Value> {
    serde_json::from_value(value).unwrap()
}

fn message(name: &str, arguments: Value) -> String {
    LrSchedule::new(name, &kwargs(arguments), 1e-3, 0, 10)
        .unwrap_err()
        .to_string()
}

#[test]
fn every_schedule_matches_transformers_to_1e_12() {
    let mut checked = 0;
    for case in cases().iter().filter(|case| !case.lr.is_empty()) {
        let schedule = LrSchedule::new(
            &case.name,
            &case.kwargs,
            case.base_lr,
            case.warmup,
            case.total,
        )
        .unwrap();
        for (step, expected) in case.lr.iter().enumerate() {
            let lr = schedule.lr(step as u64);
            // Relative to the value itself; cosines near zero carry absolute rounding.
            assert!(
                (lr - expected).abs() <= 1e-12 * expected.abs() + 1e-18,
                "{} {:?} warmup {} step {step}: {lr} instead of {expected}",
                case.name,
                case.kwargs,
                case.warmup
            );
        }
        checked += 1;
    }
    assert_eq!(checked, 36);
}

#[test]
fn the_plateau_schedule_matches_torch() {
    let all = cases();
    let case = all.iter().find(|case| !case.metrics.is_empty()).unwrap();
    let mut schedule = PlateauSchedule::new(&case.kwargs, case.base_lr).unwrap();
    for (metric, expected) in case.metrics.iter().zip(&case.lr_after_metric) {
        // The state survives being saved at any moment.
        let saved = serde_json::to_string(&schedule).unwrap();
        schedule = serde_json::from_str(&saved).unwrap();
        assert_eq!(schedule.step(*metric), *expected);
    }
}

#[test]
fn a_nan_metric_counts_as_no_improvement() {
    let arguments = kwargs(json!({"factor": 0.5, "patience": 0}));
    let mut schedule = PlateauSchedule::new(&arguments, 1.0).unwrap();
    assert_eq!(schedule.step(f64::NAN), 0.5);
    assert_eq!(schedule.step(2.0), 0.5);
    assert_eq!(schedule.step(f64::NAN), 0.25);
}

#[test]
fn the_fixture_covers_every_name() {
    for name in SCHEDULE_NAMES {
        assert!(cases().iter().any(|case| case.name == name), "{name}");
    }
}

#[test]
fn mistakes_are_named_with_the_nearest_valid_name() {
    assert!(message("cosin", json!({})).ends_with("did you mean `cosine`?"));
    let unknown = message("cosine", json!({"num_cycle": 2}));
    assert!(
        unknown.contains("lr_scheduler_kwargs.num_cycle"),
        "{unknown}"
    );
    assert!(unknown.contains("did you mean `num_cycles`?"), "{unknown}");
    assert!(message("linear", json!({"power": 2})).contains("takes none"));
    assert!(message("cosine_with_min_lr", json!({})).contains("set min_lr"));
    let both = json!({"min_lr": 0.1, "min_lr_rate": 0.1});
    assert!(message("cosine_with_min_lr", both).contains("keep one"));
    assert!(message("polynomial", json!({"lr_end": 1})).contains("not below learning_rate"));
    assert!(message("warmup_stable_decay", json!({})).contains("num_decay_steps"));
    let curve = json!({"num_decay_steps": 3, "decay_type": "sqrt"});
    assert!(message("warmup_stable_decay", curve).contains("1-sqrt"));
    assert!(message("reduce_lr_on_plateau", json!({})).contains("PlateauSchedule"));
    assert!(message("greedy", json!({})).contains("not supported yet"));
}

#[test]
fn degenerate_lengths_give_finite_rates() {
    let arguments = [
        ("polynomial", json!({})),
        ("linear", json!({})),
        ("cosine", json!({})),
        ("inverse_sqrt", json!({})),
        ("cosine_warmup_with_min_lr", json!({"min_lr_rate": 0.1})),
        ("warmup_stable_decay", json!({"num_decay_steps": 5})),
    ];
    for (name, arguments) in arguments {
        for (warmup, total) in [(0, 0), (5, 5), (7, 3), (1, 1)] {
            let schedule =
                LrSchedule::new(name, &kwargs(arguments.clone()), 1e-3, warmup, total).unwrap();
            for step in 0..10 {
                assert!(
                    schedule.lr(step).is_finite(),
                    "{name} {warmup} {total} {step}"
                );
            }
        }
    }
}
