//! Which checkpoints there are, which one to resume from, which ones may go.

use super::{Checkpoint, path_of, step_of};
use crate::io::remove_dir;
use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// The checkpoints in `output_dir` by step, oldest first, unverified.
///
/// Temporary directories, links and other names are passed over; a directory that does not exist has
/// none.
///
/// # Errors
/// [`Error::Read`].
pub fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(output_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::read(output_dir)(e)),
    };
    let mut steps = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::read(output_dir))?;
        let Some(step) = entry.file_name().to_str().and_then(step_of) else {
            continue;
        };
        if entry
            .file_type()
            .map_err(Error::read(entry.path()))?
            .is_dir()
        {
            steps.push(step);
        }
    }
    steps.sort_unstable();
    Ok(steps
        .into_iter()
        .map(|step| (step, path_of(output_dir, step)))
        .collect())
}

/// The newest checkpoint that verifies, and for each newer one that does not, what is wrong.
///
/// `None` if there are no checkpoints at all. Call [`remove_stale`](crate::io::remove_stale) first:
/// it brings back a checkpoint that a killed process was replacing.
///
/// # Errors
/// [`Error::Checkpoint`] if there are checkpoints but none verifies: starting anew would silently
/// throw their steps away. [`Error::Read`].
pub fn latest_valid(output_dir: &Path) -> Result<Option<(Checkpoint, Vec<String>)>> {
    let checkpoints = list(output_dir)?;
    let mut skipped = Vec::new();
    for (_, path) in checkpoints.iter().rev() {
        match Checkpoint::verify(path) {
            Ok(checkpoint) => return Ok(Some((checkpoint, skipped))),
            Err(error) => skipped.push(error.to_string()),
        }
    }
    if skipped.is_empty() {
        return Ok(None);
    }
    Err(Error::checkpoint(
        output_dir,
        format!(
            "no checkpoint can be resumed from, expected one of {} to be whole: {}; to start anew, \
             choose another output directory or move them away",
            skipped.len(),
            skipped.join("; ")
        ),
    ))
}

/// Deletes all but the `keep` newest checkpoints (at least one), and returns what it deleted. The one of
/// step `best` stays too and counts as one of them, beside at least the newest.
///
/// They are counted from the newest that verifies. It always stays, and if none verifies all stay; one
/// that is newer but does not verify is left for inspection. A directory is renamed to a hidden name
/// before its files go, so a crash leaves no half of a checkpoint.
///
/// # Errors
/// [`Error::Write`] if one cannot be deleted, [`Error::Read`].
pub fn rotate(output_dir: &Path, keep: usize, best: Option<u64>) -> Result<Vec<PathBuf>> {
    let mut checkpoints = list(output_dir)?;
    let excess = |n: usize| n.saturating_sub(keep.max(1));
    if excess(checkpoints.len()) == 0 {
        return Ok(Vec::new());
    }
    while let Some((_, newest)) = checkpoints.last() {
        if Checkpoint::verify(newest).is_ok() {
            break;
        }
        checkpoints.pop();
    }
    let excess = excess(checkpoints.len());
    checkpoints.pop();
    checkpoints.retain(|(step, _)| Some(*step) != best);
    checkpoints.truncate(excess);
    let mut removed = Vec::with_capacity(checkpoints.len());
    for (_, path) in checkpoints {
        remove_dir(&path).map_err(Error::write(&path))?;
        removed.push(path);
    }
    Ok(removed)
}

/// Deletes every checkpoint of `output_dir`, whole or not, and returns what it deleted, for a run
/// that starts over there.
///
/// # Errors
/// As [`rotate`].
pub fn remove_all(output_dir: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for (_, path) in list(output_dir)? {
        remove_dir(&path).map_err(Error::write(&path))?;
        removed.push(path);
    }
    Ok(removed)
}
