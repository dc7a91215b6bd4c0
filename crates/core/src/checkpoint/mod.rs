//! `checkpoint-N/` directories that are whole, verified, or not there.
//!
//! The contents are what the Hugging Face ecosystem expects and are written by the caller; here they
//! are staged, listed with sizes and BLAKE3 sums in `ferrotune.json`, flushed to disk and renamed
//! into place. Before a checkpoint is used every byte of it is checked; the step number, never a
//! file time, decides which one is newest.

mod base_record;
mod fingerprint;
mod manifest;
mod optimizer;
mod rotation;
#[cfg(test)]
mod tests;

use crate::io::StagedDir;
use crate::{Error, Result};
pub use base_record::{BASE_RECORD, BaseRecord, Likeness};
pub use fingerprint::data_digest;
pub use manifest::{FileRecord, MANIFEST, Manifest, RunIdentity};
pub use optimizer::{OPTIMIZER, read_optimizer, write_optimizer};
pub use rotation::{latest_valid, list, remove_all, rotate};
use std::path::{Path, PathBuf};

const PREFIX: &str = "checkpoint-";

/// A checkpoint whose every file was found as its manifest describes it.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Writes `output_dir/checkpoint-{step}` and returns its path.
    ///
    /// `fill` is called with a hidden directory and writes the contents there, subdirectories
    /// allowed, links not. A checkpoint of the same step is replaced. If anything fails, nothing of
    /// the new checkpoint stays and an old one of the same step is untouched.
    ///
    /// # Errors
    /// Those of `fill`; [`Error::Write`] if the directory cannot be written.
    pub fn write(
        output_dir: &Path,
        step: u64,
        identity: &RunIdentity,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = path_of(output_dir, step);
        let staged = StagedDir::create(&path)?;
        fill(staged.path())?;
        Manifest::of(staged.path(), step, identity)?.write(staged.path())?;
        staged.publish()?;
        Ok(path)
    }

    /// Reads the manifest of the checkpoint at `path` and every file it lists.
    ///
    /// Files that the manifest does not list are ignored.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the file that is missing, damaged or of another length, or saying
    /// that the directory was not written by this program or is of another step than its name.
    pub fn verify(path: &Path) -> Result<Self> {
        let manifest = Self::glance(path)?;
        manifest.verify(path)?;
        Ok(Self {
            path: path.into(),
            manifest,
        })
    }

    /// The part of [`Checkpoint::verify`] whose time does not grow with the checkpoint: its
    /// manifest, and that every file is there with its length.
    ///
    /// # Errors
    /// As [`Checkpoint::verify`].
    pub fn glance(path: &Path) -> Result<Manifest> {
        let manifest = Manifest::read(path)?;
        let name = path.file_name().and_then(|n| n.to_str());
        let named = name.and_then(step_of);
        if named.is_some_and(|step| step != manifest.step) {
            return Err(Error::checkpoint(
                path,
                format!(
                    "{MANIFEST} says step {}, the directory's name another; give the directory its \
                     old name back",
                    manifest.step
                ),
            ));
        }
        manifest.check_lengths(path)?;
        Ok(manifest)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Optimizer steps done when it was written.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// What the manifest says.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

/// `output_dir/checkpoint-{step}`.
#[must_use]
pub fn path_of(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(format!("{PREFIX}{step}"))
}

/// The step of a directory name as [`path_of`] makes it.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(PREFIX)?;
    let step: u64 = digits.parse().ok()?;
    (step.to_string() == digits).then_some(step)
}
