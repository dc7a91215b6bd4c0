//! What a run does not go on from, or start over.

use super::common::{self, Workbench, copy_dir, entries, read};
use super::{assert_same_result, changes, checkpoints, killed_after, uninterrupted, with};
use ferrotune::core::checkpoint::Checkpoint;
use serde_json::{Value, json};
use std::path::Path;

/// A killed run that is to go on with `change`: refused in words with all `parts`, and nothing is lost.
#[track_caller]
fn assert_refused(change: &Value, parts: &[&str]) {
    let bench = uninterrupted();
    killed_after(&bench, "other", 4);
    let finished = bench.train("other", &with(&bench, change)).expect(78);
    for part in parts {
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
fn a_resume_with_another_learning_rate_is_refused_by_name() {
    let parts = ["learning_rate", "0.01", "0.02", "output_dir"];
    assert_refused(&json!({"learning_rate": 0.02}), &parts);
}

#[test]
fn a_resume_with_another_optimizer_is_refused_by_name() {
    let parts = ["`optim`", "adamw_torch_fused", "lion_8bit", "output_dir"];
    assert_refused(&json!({"optim": "lion_8bit"}), &parts);
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

/// Every byte of a directory, by file; no directory inside.
fn contents(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let names = entries(directory).into_iter();
    let files = names.filter(|name| directory.join(name).is_file());
    files
        .map(|name| (name.clone(), read(&directory.join(&name))))
        .collect()
}

#[test]
fn a_checkpoint_that_cannot_be_gone_on_from_is_refused_before_the_data_are_read() {
    let bench = uninterrupted();
    let whole = bench.path("whole");
    let shorter = bench.path("shorter/checkpoint-4");
    copy_dir(&whole.join("checkpoint-4"), &shorter);
    std::fs::write(shorter.join("optimizer.safetensors"), "short").expect("writable");
    let nothing = bench.path("nothing");
    std::fs::create_dir(&nothing).expect("writable");
    // Whoever reads this says so.
    std::fs::write(bench.path("rows.jsonl"), "no JSON\n").expect("writable");
    let sound = whole.join("checkpoint-4");
    for (from, more, code, parts) in [
        (
            json!(whole.join("checkpoint-40")),
            json!({}),
            78,
            ["resume_from_checkpoint", "does not exist", "checkpoint-12"],
        ),
        (
            json!(bench.path("rows.jsonl")),
            json!({}),
            78,
            ["resume_from_checkpoint", "rows.jsonl", "is a file"],
        ),
        (
            json!(whole),
            json!({}),
            78,
            [
                "resume_from_checkpoint",
                "holds checkpoints",
                "checkpoint-12",
            ],
        ),
        (
            json!(nothing),
            json!({}),
            65,
            ["nothing", "ferrotune.json", "missing"],
        ),
        (
            json!(shorter),
            json!({}),
            65,
            ["optimizer.safetensors", "5 bytes", "expected"],
        ),
        (
            json!(sound),
            json!({"learning_rate": 0.5}),
            78,
            ["another run", "learning_rate", "0.5"],
        ),
        (
            json!(true),
            json!({}),
            78,
            ["resume_from_checkpoint", "no checkpoint", "auto"],
        ),
    ] {
        let mut changes = with(&bench, &more);
        changes["resume_from_checkpoint"] = from.clone();
        let finished = bench.train("new", &changes).expect(code);
        for part in parts {
            assert!(
                finished.stderr.contains(part),
                "{from}: no {part}: {}",
                finished.stderr
            );
        }
        assert!(!bench.path("new").exists(), "{from}");
    }
    // The data are looked at after that: this is the fault that is left.
    let changes = with(&bench, &json!({"resume_from_checkpoint": sound}));
    let finished = bench.train("new", &changes).expect(65);
    assert!(
        finished.stderr.contains("rows.jsonl:1"),
        "{}",
        finished.stderr
    );
}

#[test]
fn a_checkpoint_that_was_being_replaced_counts_as_there() {
    let bench = uninterrupted();
    let output = killed_after(&bench, "replaced", 4);
    for step in 1..4 {
        let older = output.join(format!("checkpoint-{step}"));
        std::fs::remove_dir_all(older).expect("there");
    }
    // As a kill between the two renames leaves it.
    let aside = output.join(".checkpoint-4.replaced-by-ferrotune-1-0");
    std::fs::rename(output.join("checkpoint-4"), aside).expect("renamed");
    let changes = with(&bench, &json!({"resume_from_checkpoint": true}));
    bench.train("replaced", &changes).expect(0);
    assert_same_result(&bench.path("whole"), &output);
}

#[test]
fn a_restore_that_fails_leaves_the_log_and_everything_else_as_it_was() {
    let bench = uninterrupted();
    let output = killed_after(&bench, "broken", 7);
    // Whole by its manifest, and yet no state to go on from: the moments are of another step.
    let newest = output.join("checkpoint-7");
    let identity = Checkpoint::verify(&newest)
        .expect("whole")
        .manifest()
        .run
        .clone();
    let foreign = output.join("checkpoint-6/optimizer.safetensors");
    Checkpoint::write(&output, 7, &identity, |directory| {
        let source = bench.path("whole/checkpoint-7");
        copy_dir(&source, directory);
        std::fs::remove_file(directory.join("ferrotune.json")).expect("there");
        std::fs::copy(&foreign, directory.join("optimizer.safetensors")).expect("copied");
        Ok(())
    })
    .expect("writable");
    let (files, old) = (contents(&output), contents(&newest));
    assert!(files.iter().any(|(name, _)| name == "trainer_log.jsonl"));
    let finished = bench.train("broken", &changes(&bench)).expect(65);
    assert!(
        finished
            .stderr
            .contains("is of step 6, the checkpoint of step 7"),
        "{}",
        finished.stderr
    );
    assert!(files == contents(&output), "a file has changed");
    assert!(old == contents(&newest), "the checkpoint has changed");
}

#[test]
fn an_older_checkpoint_with_nothing_left_to_train_does_not_replace_the_result() {
    let bench = Workbench::new(19);
    let steady = json!({"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 4});
    bench.train("whole", &with(&bench, &steady)).expect(0);
    let output = bench.path("whole");
    let files = ["adapter_model.safetensors", "run.json", "trainer_log.jsonl"];
    let before = files.map(|file| read(&output.join(file)));
    let mut back = steady;
    back["max_steps"] = json!(1);
    back["resume_from_checkpoint"] = json!(output.join("checkpoint-2"));
    let refused = bench.train("whole", &with(&bench, &back)).expect(78);
    assert!(
        refused.stderr.contains("leaves nothing to train"),
        "{}",
        refused.stderr
    );
    assert!(
        before == files.map(|file| read(&output.join(file))),
        "files changed"
    );
}
