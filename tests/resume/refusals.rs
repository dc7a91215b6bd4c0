//! What a run does not go on from, or start over.

use super::common::{self, Workbench, read};
use super::{assert_same_result, changes, checkpoints, killed_after, uninterrupted, with};
use serde_json::json;

#[test]
fn a_resume_with_another_learning_rate_is_refused_by_name() {
    let bench = uninterrupted();
    killed_after(&bench, "other", 4);
    let finished = bench
        .train("other", &with(&bench, &json!({"learning_rate": 0.02})))
        .expect(78);
    for part in ["learning_rate", "0.01", "0.02", "output_dir"] {
        assert!(
            finished.stderr.contains(part),
            "{part}: {}",
            finished.stderr
        );
    }
    assert_eq!(
        checkpoints(&bench.path("other")).len(),
        4,
        "nothing was lost"
    );
}

#[test]
fn a_resume_with_other_data_is_refused() {
    let bench = uninterrupted();
    killed_after(&bench, "other", 4);
    let mut rows = common::chat_rows(19);
    rows[3] = json!({"messages": [
        {"role": "user", "content": "other"}, {"role": "assistant", "content": "row"},
    ]});
    common::write_rows(&bench.path("rows.jsonl"), &rows);
    let finished = bench.train("other", &changes(&bench)).expect(78);
    assert!(finished.stderr.contains("data"), "{}", finished.stderr);
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_with_a_warning() {
    let bench = uninterrupted();
    let output = killed_after(&bench, "damaged", 7);
    let path = output.join("checkpoint-7/optimizer.safetensors");
    let mut bytes = read(&path);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).expect("writable");
    let finished = bench.train("damaged", &changes(&bench)).expect(0);
    assert!(
        finished.stderr.contains("checkpoint-7"),
        "no warning: {}",
        finished.stderr
    );
    assert_same_result(&bench.path("whole"), &output);
}

#[test]
fn a_damaged_checkpoint_that_was_asked_for_is_an_error() {
    let bench = uninterrupted();
    let output = killed_after(&bench, "damaged", 2);
    let checkpoint = output.join("checkpoint-2");
    std::fs::write(checkpoint.join("adapter_model.safetensors"), "short").expect("writable");
    let changes = with(&bench, &json!({"resume_from_checkpoint": checkpoint}));
    let finished = bench.train("damaged", &changes).expect(65);
    assert!(
        finished.stderr.contains("adapter_model.safetensors"),
        "{}",
        finished.stderr
    );
}

#[test]
fn true_without_a_checkpoint_is_an_error_and_auto_starts_anew() {
    let bench = Workbench::new(8);
    let finished = bench
        .train(
            "none",
            &with(&bench, &json!({"resume_from_checkpoint": true})),
        )
        .expect(78);
    assert!(
        finished.stderr.contains("resume_from_checkpoint") && finished.stderr.contains("auto"),
        "{}",
        finished.stderr
    );
    bench.train("auto", &changes(&bench)).expect(0);
}

#[test]
fn an_output_directory_with_checkpoints_is_not_overwritten_unasked() {
    let bench = uninterrupted();
    let fresh = with(&bench, &json!({"resume_from_checkpoint": null}));
    let finished = bench.train("whole", &fresh).expect(78);
    for part in ["output_dir", "auto", "overwrite_output_dir"] {
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
}

#[test]
fn a_resume_with_other_weights_of_the_same_shapes_is_refused() {
    let bench = uninterrupted();
    killed_after(&bench, "other", 4);
    common::write_model(
        &bench.path("base"),
        &common::Shape::default(),
        common::Stored::F32,
        8,
    );
    let finished = bench.train("other", &changes(&bench)).expect(78);
    assert!(
        finished.stderr.contains("base_model"),
        "{}",
        finished.stderr
    );
}
