//! A process killed while it saves never costs a finished checkpoint.

use ferrotune_core::checkpoint::{Checkpoint, RunIdentity, latest_valid, list, rotate};
use ferrotune_core::io::{remove_stale, write_file};
use ferrotune_core::{Error, Result};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Tells the child where to save.
const DIRECTORY: &str = "FERROTUNE_TEST_SAVES_TO";
const ROUNDS: u64 = 20;
const FILES: [&str; 3] = [
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
];

fn contents(step: u64, file: usize) -> Vec<u8> {
    (0..100_000 << file)
        .map(|i: u64| (i.wrapping_mul(step + 3) >> 3) as u8)
        .collect()
}

fn save(dir: &Path, step: u64) -> Result<()> {
    Checkpoint::write(dir, step, &RunIdentity::default(), |staged| {
        for (i, name) in FILES.iter().enumerate() {
            write_file(&staged.join(name), &contents(step, i))?;
        }
        Ok(())
    })?;
    rotate(dir, 2, None).map(|_| ())
}

/// The child. Run by hand it has nothing to do.
#[test]
#[ignore = "started by a_kill_at_any_moment_leaves_the_newest_checkpoint_whole"]
fn saves_until_killed() {
    let Ok(dir) = std::env::var(DIRECTORY) else {
        return;
    };
    let dir = Path::new(&dir);
    let newest = latest_valid(dir).expect("whole");
    let mut step = newest.map_or(0, |(checkpoint, _)| checkpoint.step());
    loop {
        step += 1;
        save(dir, step).expect("writable");
        // A stop signal right after a periodic save writes the same step again.
        if step.is_multiple_of(2) {
            save(dir, step).expect("writable");
        }
    }
}

fn run_and_kill(dir: &Path, after: Duration) {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["saves_until_killed", "--exact", "--ignored"])
        .env(DIRECTORY, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("startable");
    std::thread::sleep(after);
    let running = child.try_wait().expect("a child").is_none();
    child.kill().expect("killable");
    child.wait().expect("a child");
    assert!(running, "the child must save until it is killed");
}

fn check(dir: &Path, step: u64) -> Result<()> {
    for (i, name) in FILES.iter().enumerate() {
        let path = dir.join(format!("checkpoint-{step}")).join(name);
        let found = std::fs::read(&path).map_err(Error::read(&path))?;
        assert_eq!(found, contents(step, i), "{}", path.display());
    }
    Ok(())
}

#[test]
fn a_kill_at_any_moment_leaves_the_newest_checkpoint_whole() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (mut newest_step, mut kills_while_writing) = (0, 0);
    for round in 0..ROUNDS {
        // Spread over several saves; the moment within one is as good as random.
        run_and_kill(dir.path(), Duration::from_millis(40 + round * 37 % 160));
        let stale = remove_stale(dir.path()).expect("removable");
        kills_while_writing += u64::from(!stale.is_empty());
        for entry in std::fs::read_dir(dir.path()).expect("readable") {
            let name = entry.expect("entry").file_name();
            assert!(
                name.to_string_lossy().starts_with("checkpoint-"),
                "litter: {name:?}"
            );
        }
        let listed = list(dir.path()).expect("readable");
        let Some((newest, skipped)) = latest_valid(dir.path()).expect("no damaged ones") else {
            assert_eq!(newest_step, 0, "round {round}: all checkpoints are gone");
            continue;
        };
        assert!(skipped.is_empty(), "round {round}: {skipped:?}");
        assert_eq!(listed.last().map(|l| l.0), Some(newest.step()));
        assert!(
            newest.step() >= newest_step,
            "round {round} went back to {}",
            newest.step()
        );
        newest_step = newest.step();
        check(dir.path(), newest_step).expect("the contents of its step");
    }
    assert!(
        newest_step > ROUNDS / 4,
        "only {newest_step} checkpoints were saved"
    );
    assert!(
        kills_while_writing > 0,
        "no kill hit a save: the test tests nothing"
    );
}
