//! One run for one output directory.

use crate::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::Path;

const NAME: &str = ".ferrotune.lock";
/// More than the note of the holder ever has.
const MAX_NOTE_BYTES: u64 = 256;

/// Held while a run writes to its output directory; given back when dropped or when the process ends,
/// however it ends.
///
/// An advisory file lock: it keeps two runs of one machine apart, and those of several machines where
/// the file system passes locks on. Where it knows no locks the run goes on with a warning.
#[derive(Debug)]
pub struct OutputLock {
    _file: File,
}

impl OutputLock {
    /// Takes the lock of `dir`, which must exist.
    ///
    /// # Errors
    /// [`Error::Transient`] if another run holds it, [`Error::Write`] if the file cannot be made.
    pub fn acquire(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let mut file = open(&path).map_err(Error::write(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken(dir, &file)),
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!(
                    path = %path.display(),
                    "the file system has no locks: make sure that no other run writes here"
                );
            }
            Err(TryLockError::Error(e)) => return Err(Error::write(&path)(e)),
        }
        let note = format!("process {}\n", std::process::id());
        file.set_len(0)
            .and_then(|()| file.write_all(note.as_bytes()))
            .map_err(Error::write(&path))?;
        Ok(Self { _file: file })
    }
}

/// Opens the file, but not what a planted link points at: it would be cut to the length of the note.
fn open(path: &Path) -> io::Result<File> {
    match std::fs::symlink_metadata(path) {
        Ok(about) if !about.is_file() => {
            return Err(io::Error::other("is not a regular file; remove it"));
        }
        _ => {}
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

fn taken(dir: &Path, file: &File) -> Error {
    let mut holder = String::new();
    // The note only makes the message better.
    let _ = file.take(MAX_NOTE_BYTES).read_to_string(&mut holder);
    let holder = match holder.trim() {
        "" => "another process",
        note => note,
    };
    Error::Transient {
        message: format!(
            "output directory {} is in use by {holder}: wait for it, stop it, or choose another \
             output_dir",
            dir.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_run_in_a_directory_is_refused_until_the_first_ends() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let first = OutputLock::acquire(dir.path()).expect("free");
        let error = OutputLock::acquire(dir.path()).expect_err("taken");
        assert_eq!(error.exit_code(), crate::ExitCode::Transient);
        let expected = format!("in use by process {}", std::process::id());
        assert!(error.to_string().contains(&expected), "{error}");
        drop(first);
        OutputLock::acquire(dir.path()).expect("free again");
    }
}
