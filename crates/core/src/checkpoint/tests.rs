use super::{Checkpoint, MANIFEST, RunIdentity, latest_valid, list, rotate};
use crate::io::remove_stale;
use crate::{Error, ExitCode, Result};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn identity() -> RunIdentity {
    RunIdentity {
        config: json!({"learning_rate": 2e-4, "lora_r": 8, "target_modules": ["q_proj"]}),
        fingerprints: BTreeMap::from([("base_model".into(), "abc".into())]),
    }
}

fn fill(dir: &Path) -> Result<()> {
    fs::write(dir.join("adapter_model.safetensors"), vec![7; 5000]).map_err(Error::write(dir))?;
    fs::write(dir.join("trainer_state.json"), "{\"global_step\": 3}").map_err(Error::write(dir))?;
    fs::create_dir(dir.join("tokenizer")).map_err(Error::write(dir))?;
    fs::write(dir.join("tokenizer/tokenizer.json"), "{}").map_err(Error::write(dir))?;
    fs::write(dir.join("empty"), "").map_err(Error::write(dir))
}

fn save(output_dir: &Path, step: u64) -> PathBuf {
    Checkpoint::write(output_dir, step, &identity(), fill).expect("writable")
}

fn steps(output_dir: &Path) -> Vec<u64> {
    let found = list(output_dir).expect("readable");
    found.into_iter().map(|(step, _)| step).collect()
}

fn entries(dir: &Path) -> Vec<String> {
    let found = fs::read_dir(dir).expect("readable");
    let mut names: Vec<String> = found
        .map(|e| e.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn message(error: &Error) -> String {
    assert!(matches!(error, Error::Checkpoint { .. }), "{error:?}");
    assert_eq!(error.exit_code(), ExitCode::BadInput);
    error.to_string()
}

fn files_of(checkpoint: &Path) -> Vec<PathBuf> {
    let manifest = Checkpoint::verify(checkpoint).expect("whole");
    let listed = manifest.manifest().files.keys();
    let mut paths: Vec<PathBuf> = listed.map(|name| checkpoint.join(name)).collect();
    paths.push(checkpoint.join(MANIFEST));
    paths
}

#[test]
fn what_is_written_verifies_and_says_what_run_it_is_of() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let output = dir.path().join("not/there/yet");
    let path = save(&output, 3);
    assert_eq!(path, output.join("checkpoint-3"));
    assert_eq!(entries(&output), ["checkpoint-3"]);
    let checkpoint = Checkpoint::verify(&path).expect("whole");
    assert_eq!((checkpoint.step(), checkpoint.path()), (3, path.as_path()));
    assert_eq!(checkpoint.manifest().run, identity());
    let names: Vec<&String> = checkpoint.manifest().files.keys().collect();
    let expected = [
        "adapter_model.safetensors",
        "empty",
        "tokenizer/tokenizer.json",
        "trainer_state.json",
    ];
    assert_eq!(names, expected);
    fs::write(path.join("notes.txt"), "mine").expect("writable");
    assert!(
        Checkpoint::verify(&path).is_ok(),
        "files of the user do no harm"
    );
}

#[test]
fn equal_contents_make_equal_manifests() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (a, b) = (
        save(&dir.path().join("a"), 3),
        save(&dir.path().join("b"), 3),
    );
    let read = |p: &Path| fs::read(p.join(MANIFEST)).expect("readable");
    assert_eq!(read(&a), read(&b));
}

#[test]
fn a_flipped_bit_a_cut_or_a_missing_file_is_found_and_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = save(dir.path(), 3);
    for file in files_of(&path) {
        let whole = fs::read(&file).expect("readable");
        let name = file
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let stride = if whole.len() > 4096 { 61 } else { 1 };
        for at in (0..whole.len()).step_by(stride) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&file, bytes).expect("writable");
            let text = message(&Checkpoint::verify(&path).expect_err("flipped"));
            assert!(text.contains(&name), "byte {at} of {name}: {text}");
        }
        for len in [0, 1, whole.len() / 2, whole.len().saturating_sub(1)] {
            if len < whole.len() {
                fs::write(&file, &whole[..len]).expect("writable");
                let text = message(&Checkpoint::verify(&path).expect_err("cut"));
                assert!(text.contains(&name), "{name} cut to {len}: {text}");
            }
        }
        let longer: Vec<u8> = whole.iter().copied().chain([b' ']).collect();
        fs::write(&file, longer).expect("writable");
        let text = message(&Checkpoint::verify(&path).expect_err("longer"));
        assert!(text.contains(&name), "{text}");
        fs::remove_file(&file).expect("removable");
        let text = message(&Checkpoint::verify(&path).expect_err("missing"));
        assert!(
            text.contains(&name) && text.contains("is missing"),
            "{text}"
        );
        fs::write(&file, &whole).expect("writable");
    }
    assert!(Checkpoint::verify(&path).is_ok());
}

#[test]
fn a_directory_of_another_step_or_of_another_program_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = save(dir.path(), 3);
    let renamed = dir.path().join("checkpoint-4");
    fs::rename(&path, &renamed).expect("renamable");
    let text = message(&Checkpoint::verify(&renamed).expect_err("renamed"));
    assert!(text.contains("says step 3"), "{text}");
    let best = dir.path().join("best");
    fs::rename(&renamed, &best).expect("renamable");
    assert_eq!(
        Checkpoint::verify(&best)
            .expect("any other name will do")
            .step(),
        3
    );
    let foreign = dir.path().join("checkpoint-7");
    fs::create_dir(&foreign).expect("writable");
    fs::write(foreign.join("trainer_state.json"), "{}").expect("writable");
    let text = message(&Checkpoint::verify(&foreign).expect_err("foreign"));
    assert!(text.contains("ferrotune.json is missing"), "{text}");
    assert!(Checkpoint::verify(&dir.path().join("checkpoint-8")).is_err());
}

/// Rewrites a manifest and its sum, as an attacker can.
fn forge(checkpoint: &Path, from: &str, to: &str) {
    let path = checkpoint.join(MANIFEST);
    let text = fs::read_to_string(&path)
        .expect("readable")
        .replace(from, to);
    let start = "{\n  \"blake3\": \"".len();
    let zeroed = format!(
        "{}{}{}",
        &text[..start],
        "0".repeat(64),
        &text[start + 64..]
    );
    let sum = crate::io::blake3_of_bytes(zeroed.as_bytes());
    let forged = format!("{}{sum}{}", &text[..start], &text[start + 64..]);
    fs::write(path, forged).expect("writable");
}

#[test]
fn a_forged_manifest_cannot_point_out_of_its_directory() {
    let dir = tempfile::tempdir().expect("temporary directory");
    fs::write(dir.path().join("secret"), "").expect("writable");
    let absolute = dir.path().join("secret");
    for name in [
        "../secret",
        "tokenizer/../../secret",
        absolute.to_str().expect("UTF-8"),
        "a//b",
    ] {
        let path = save(dir.path(), 3);
        forge(&path, "\"empty\"", &format!("{name:?}"));
        let text = message(&Checkpoint::verify(&path).expect_err(name));
        assert!(text.contains("expected one plain name"), "{text}");
    }
    let path = save(dir.path(), 3);
    forge(&path, "\"schema_version\": 1", "\"schema_version\": 2");
    let text = message(&Checkpoint::verify(&path).expect_err("newer"));
    assert!(text.contains("layout version 2, expected 1"), "{text}");
}

#[cfg(unix)]
#[test]
fn links_are_neither_saved_nor_verified_nor_listed() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = save(dir.path(), 3);
    let moved = dir.path().join("elsewhere");
    fs::rename(path.join("empty"), &moved).expect("renamable");
    symlink(&moved, path.join("empty")).expect("linkable");
    let text = message(&Checkpoint::verify(&path).expect_err("a link"));
    assert!(text.contains("is not a regular file"), "{text}");

    let error = Checkpoint::write(dir.path(), 4, &identity(), |d| {
        symlink("/etc/passwd", d.join("x")).map_err(Error::write(d))
    })
    .expect_err("a link");
    assert!(
        error.to_string().contains("files and directories only"),
        "{error}"
    );

    let target = tempfile::tempdir().expect("temporary directory");
    symlink(target.path(), dir.path().join("checkpoint-5")).expect("linkable");
    assert_eq!(steps(dir.path()), [3]);
    let error = Checkpoint::write(dir.path(), 5, &identity(), fill).expect_err("a planted link");
    assert_eq!(error.exit_code(), ExitCode::CannotWrite, "{error}");
    assert!(entries(target.path()).is_empty());
}

#[test]
fn a_failed_save_leaves_the_old_checkpoint_and_nothing_else() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = save(dir.path(), 3);
    let fail = |d: &Path| {
        fill(d)?;
        Err(Error::write(d)(std::io::ErrorKind::StorageFull.into()))
    };
    let error = Checkpoint::write(dir.path(), 3, &identity(), fail).expect_err("full");
    assert_eq!(error.exit_code(), ExitCode::CannotWrite);
    assert_eq!(entries(dir.path()), ["checkpoint-3"]);
    assert!(Checkpoint::verify(&path).is_ok());
    let own_manifest = |d: &Path| fs::write(d.join(MANIFEST), "{}").map_err(Error::write(d));
    assert!(Checkpoint::write(dir.path(), 3, &identity(), own_manifest).is_err());
    assert!(Checkpoint::verify(&path).is_ok());
}

#[test]
fn saving_the_same_step_again_replaces_it() {
    let dir = tempfile::tempdir().expect("temporary directory");
    save(dir.path(), 3);
    let other = |d: &Path| fs::write(d.join("only"), "new").map_err(Error::write(d));
    let path = Checkpoint::write(dir.path(), 3, &identity(), other).expect("writable");
    assert_eq!(entries(&path), [MANIFEST, "only"]);
    assert_eq!(entries(dir.path()), ["checkpoint-3"]);
}

#[test]
fn listing_is_numeric_and_passes_over_foreign_names() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for step in [100, 20, 3] {
        save(dir.path(), step);
    }
    for name in [
        "checkpoint-",
        "checkpoint-x",
        "checkpoint-07",
        "checkpoint-+7",
        "runs",
    ] {
        fs::create_dir(dir.path().join(name)).expect("writable");
    }
    fs::create_dir(dir.path().join(".ferrotune-1-1.tmp")).expect("writable");
    fs::write(dir.path().join("checkpoint-9"), "a file").expect("writable");
    assert_eq!(steps(dir.path()), [3, 20, 100]);
    assert!(
        list(&dir.path().join("none"))
            .expect("no directory, no checkpoints")
            .is_empty()
    );
}

#[test]
fn the_newest_whole_checkpoint_is_found_and_the_damaged_ones_are_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    assert!(latest_valid(dir.path()).expect("empty").is_none());
    for step in [9, 10, 11] {
        save(dir.path(), step);
    }
    let (newest, skipped) = latest_valid(dir.path()).expect("readable").expect("some");
    assert_eq!((newest.step(), skipped.len()), (11, 0));
    fs::write(dir.path().join("checkpoint-11/trainer_state.json"), "{}").expect("writable");
    fs::remove_file(dir.path().join("checkpoint-10").join(MANIFEST)).expect("removable");
    let (newest, skipped) = latest_valid(dir.path()).expect("readable").expect("some");
    assert_eq!(newest.step(), 9);
    assert!(
        skipped[0].contains("checkpoint-11/trainer_state.json"),
        "{skipped:?}"
    );
    assert!(skipped[1].contains("checkpoint-10"), "{skipped:?}");
    fs::remove_file(dir.path().join("checkpoint-9/empty")).expect("removable");
    let text = message(&latest_valid(dir.path()).expect_err("all damaged"));
    assert!(text.contains("no checkpoint can be resumed from"), "{text}");
    assert!(
        text.contains("checkpoint-9/empty") && text.contains("checkpoint-11"),
        "{text}"
    );
}

#[test]
fn rotation_keeps_the_newest_whole_ones() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for step in 1..=5 {
        save(dir.path(), step);
    }
    let removed = rotate(dir.path(), 3, None).expect("removable");
    assert_eq!(
        removed,
        [
            dir.path().join("checkpoint-1"),
            dir.path().join("checkpoint-2")
        ]
    );
    assert_eq!(
        entries(dir.path()),
        ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    );
    fs::remove_file(dir.path().join("checkpoint-5/empty")).expect("removable");
    rotate(dir.path(), 1, None).expect("removable");
    assert_eq!(steps(dir.path()), [4, 5], "5 is damaged, so 4 must stay");
    fs::remove_file(dir.path().join("checkpoint-4/empty")).expect("removable");
    assert!(
        rotate(dir.path(), 1, None)
            .expect("nothing to do")
            .is_empty()
    );
    assert_eq!(steps(dir.path()), [4, 5], "none verifies, so all stay");
    save(dir.path(), 6);
    rotate(dir.path(), 0, None).expect("removable");
    assert_eq!(steps(dir.path()), [6], "the newest whole one always stays");
}

#[test]
fn rotation_keeps_the_best_beside_the_newest() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for step in 1..=5 {
        save(dir.path(), step);
    }
    rotate(dir.path(), 3, Some(2)).expect("removable");
    assert_eq!(steps(dir.path()), [2, 4, 5]);
    rotate(dir.path(), 1, Some(2)).expect("removable");
    assert_eq!(steps(dir.path()), [2, 5], "the newest stays to go on from");
    rotate(dir.path(), 1, Some(5)).expect("removable");
    assert_eq!(steps(dir.path()), [5]);
}

#[test]
fn a_replacement_that_died_half_way_is_undone_and_litter_is_removed() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = save(dir.path(), 3);
    // What a kill between the two renames of a replacement leaves.
    fs::rename(
        &path,
        dir.path().join(".checkpoint-3.replaced-by-ferrotune-77-0"),
    )
    .expect("set aside");
    fs::create_dir(dir.path().join(".ferrotune-77-1.tmp")).expect("writable");
    fs::write(
        dir.path()
            .join(".ferrotune-77-1.tmp/adapter_model.safetensors"),
        "x",
    )
    .expect("writable");
    fs::write(dir.path().join(".ferrotune-77-2.tmp"), "x").expect("writable");
    fs::write(dir.path().join(".hidden-of-the-user"), "x").expect("writable");
    assert_eq!(remove_stale(dir.path()).expect("removable").len(), 2);
    assert_eq!(entries(dir.path()), [".hidden-of-the-user", "checkpoint-3"]);
    assert!(Checkpoint::verify(&path).is_ok());
    // What a kill after both leaves.
    fs::create_dir(dir.path().join(".checkpoint-3.replaced-by-ferrotune-77-0")).expect("writable");
    remove_stale(dir.path()).expect("removable");
    assert_eq!(entries(dir.path()), [".hidden-of-the-user", "checkpoint-3"]);
}

#[test]
fn differences_of_two_runs_are_named_one_a_line() {
    let mut now = identity();
    assert!(identity().differences(&now).is_empty());
    now.config = json!({"learning_rate": 1e-4, "target_modules": ["q_proj"], "seed": 1});
    now.fingerprints.insert("base_model".into(), "def".into());
    let expected = [
        "config `learning_rate`: 0.0002 in the checkpoint, 0.0001 now",
        "config `lora_r`: 8 in the checkpoint, absent now",
        "config `seed`: absent in the checkpoint, 1 now",
        "fingerprint `base_model`: \"abc\" in the checkpoint, \"def\" now",
    ];
    assert_eq!(identity().differences(&now), expected);
}

#[test]
fn floats_of_a_config_are_the_same_after_a_save() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let values: Vec<f64> = (1..2000).map(|i| 1.0 / f64::from(i) * 1e-5).collect();
    let run = RunIdentity {
        config: json!({ "values": values }),
        fingerprints: BTreeMap::new(),
    };
    let path = Checkpoint::write(dir.path(), 1, &run, |_| Ok(())).expect("writable");
    let saved = Checkpoint::verify(&path).expect("whole");
    assert!(saved.manifest().run.differences(&run).is_empty());
}
