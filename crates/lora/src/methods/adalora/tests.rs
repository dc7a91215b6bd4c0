use super::budget::{Budget, Left};
use crate::method::{Keys, Source};
use serde_json::{Value, json};

fn budget(object: &Value) -> Budget {
    let object = object.as_object().expect("an object").clone();
    let mut keys = Keys::new(Source::Config("peft_config"), &object);
    Budget::read(&mut keys, 6).expect("sound")
}

/// What PEFT's allocator was recorded to do with 6 modules.
#[test]
fn the_budget_falls_by_a_cubic_curve_every_other_step() {
    let budget = budget(&json!({
        "target_r": 2, "tinit": 3, "tfinal": 6, "deltaT": 2, "total_step": 24,
    }));
    let at = |step| budget.at(step, 6).expect("a schedule");
    for step in [0, 1, 2, 3, 5, 7, 17] {
        assert_eq!(at(step), Left::Measured(None), "step {step}");
    }
    assert_eq!(at(4), Left::Measured(Some(31)));
    assert_eq!(at(6), Left::Measured(Some(24)));
    assert_eq!(at(8), Left::Measured(Some(19)));
    assert_eq!(at(18), Left::Decided(12));
    assert_eq!([at(19), at(23)], [Left::Kept, Left::Kept]);
}

#[test]
fn a_schedule_without_a_length_takes_the_runs() {
    let mut open = budget(&json!({"target_r": 2, "tinit": 5}));
    assert_eq!(open.at(0, 6), None);
    let error = open.plan_steps(5).expect_err("tinit is all of it");
    assert!(error.to_string().contains("no step to cut"), "{error}");
    let mut open = budget(&json!({"target_r": 2, "tinit": 5}));
    open.plan_steps(9).expect("four steps to cut ranks at");
    assert_eq!(open.at(9, 6), Some(Left::Decided(12)));

    let mut long = budget(&json!({"target_r": 2, "total_step": 100}));
    let error = long.plan_steps(9).expect_err("longer than the run");
    assert!(error.to_string().contains("leave it out"), "{error}");
}
