use super::budget::{Budget, Left};
use crate::method::{Keys, Source};
use crate::testing::{golden, llama_sites};
use ferrotune_core::io::SafetensorsFile;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
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

/// PEFT saves it where nothing was cut.
#[test]
fn a_target_above_the_ranks_is_refused_where_a_run_asks_for_it_alone() {
    let copy = crate::testing::copy_of("adalora");
    crate::testing::edit_config(copy.path(), "target_r", json!(99));
    crate::PeftConfig::load(copy.path()).expect("as PEFT");
    let asked = json!({"peft_type": "ADALORA", "target_r": 99});
    let error =
        crate::PeftConfig::from_config("peft_config", asked.as_object().expect("an object"));
    let error = error.expect_err("nothing to cut").to_string();
    assert!(error.contains("target_r"), "{error}");
}

/// What PEFT was recorded to compute for an adapter that it had saved with fewer ranks; one module has none left.
#[test]
fn ranks_that_were_cut_before_count_for_nothing_in_the_term_of_the_loss() {
    let directory = golden("adalora_allocation/final_adapter");
    let adapter = crate::testing::load(&directory).expect("fixture");
    let mut builder = ParamLayoutBuilder::new();
    adapter
        .attach(&llama_sites(2), &mut builder)
        .expect("attaches");
    let mut params = FlatBuffer::zeros(&builder.build().expect("unique names"));
    adapter.load(&mut params, &directory).expect("fixture");
    let mut grads = FlatBuffer::zeros(params.layout());
    let term = adapter.complete_gradients(&params, 1.0, &mut grads);
    let term = term.and_then(|term| term.value()).expect("computed");

    let file = golden("../../adalora_continued/expected.safetensors");
    let recorded = SafetensorsFile::open(file).expect("fixture");
    let expected = f64::from(recorded.read_f32("term").expect("f32")[0]);
    assert!(
        (term - expected).abs() < 1e-5 * expected,
        "{term} {expected}"
    );
    for (id, segment) in grads.layout().by_name() {
        let theirs = recorded.read_f32(&segment.spec.name).expect("f32");
        let scale = theirs.iter().fold(0.0_f32, |most, g| most.max(g.abs()));
        // What PEFT has not is zero here.
        let ours = params.get(id).iter().zip(grads.get(id));
        let (there, gone): (Vec<_>, Vec<_>) = ours.partition(|(value, _)| **value != 0.0);
        assert!(
            gone.iter().all(|(_, g)| **g == 0.0),
            "{}",
            segment.spec.name
        );
        assert_eq!(there.len(), theirs.len(), "{}", segment.spec.name);
        for ((_, ours), theirs) in there.iter().zip(&theirs) {
            let error = (**ours - theirs).abs();
            assert!(
                error <= 1e-4 * scale,
                "{}: {ours} {theirs}",
                segment.spec.name
            );
        }
    }
}
