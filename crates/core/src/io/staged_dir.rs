//! A directory that appears whole or not at all.

use super::atomic::{create_temporary, parent_of, set_aside, sync_dir};
use crate::{Error, Result};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// A hidden directory beside its final place. Fill it, then [`publish`](Self::publish).
///
/// Dropped unpublished it is removed.
#[derive(Debug)]
pub struct StagedDir {
    staged: Option<PathBuf>,
    target: PathBuf,
}

impl StagedDir {
    /// Makes the hidden directory, and the parents of `target` if needed.
    ///
    /// # Errors
    /// [`Error::Write`], also if `target` exists and is not a directory (a link is not one).
    pub fn create(target: impl AsRef<Path>) -> Result<Self> {
        let target = target.as_ref();
        check_target(target).map_err(Error::write(target))?;
        let parent = parent_of(target);
        fs::create_dir_all(parent).map_err(Error::write(parent))?;
        let (staged, ()) =
            create_temporary(parent, |p| fs::create_dir(p)).map_err(Error::write(target))?;
        Ok(Self {
            staged: Some(staged),
            target: target.into(),
        })
    }

    /// Where to write the contents.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.staged.as_deref().unwrap_or(&self.target)
    }

    /// Flushes every file and directory to disk, then renames to the final place.
    ///
    /// A directory that is there already is set aside first and removed last; if the process dies in
    /// between, [`remove_stale`](super::remove_stale) brings it back.
    ///
    /// # Errors
    /// [`Error::Write`]; what was at the final place is still there.
    pub fn publish(mut self) -> Result<()> {
        let Some(staged) = self.staged.take() else {
            return Ok(());
        };
        let published = sync_tree(&staged).and_then(|()| replace(&staged, &self.target));
        published.map_err(|e| {
            self.staged = Some(staged);
            Error::write(&self.target)(e)
        })
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if let Some(staged) = self.staged.take() {
            // Nothing to tell anybody: what stays is hidden and removed at the next start.
            let _ = fs::remove_dir_all(staged);
        }
    }
}

fn check_target(target: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(target) {
        Ok(about) if about.is_dir() => Ok(true),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "is there already and is not a directory; move it away",
        )),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn replace(staged: &Path, target: &Path) -> io::Result<()> {
    let parent = parent_of(target);
    if !check_target(target)? {
        fs::rename(staged, target)?;
        return sync_dir(parent);
    }
    let aside = set_aside(target)?;
    if let Err(e) = fs::rename(staged, target) {
        // The first error is the one to report.
        let _ = fs::rename(&aside, target);
        return Err(e);
    }
    sync_dir(parent)?;
    // The new directory is in place: what cannot be removed now is removed at the next start.
    let _ = fs::remove_dir_all(aside);
    Ok(())
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            open_to_sync(&entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)
}

/// Windows flushes only what is open for writing, Unix also what is read-only.
fn open_to_sync(path: &Path) -> io::Result<File> {
    if cfg!(windows) {
        fs::OpenOptions::new().append(true).open(path)
    } else {
        File::open(path)
    }
}
