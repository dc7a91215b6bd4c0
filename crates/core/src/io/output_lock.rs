//! One run for one output directory.

use crate::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const NAME: &str = ".ferrotune.lock";
/// More than the note of the holder ever has.
const MAX_NOTE_BYTES: u64 = 256;

/// Held while a run writes to its output directory; given back when dropped or when the process ends,
/// however it ends.
///
/// An advisory file lock: it keeps two runs of one machine apart, and those of several machines where
/// the file system passes locks on. Where it knows no locks the run goes on with a warning.
///
/// A directory that was made for it goes again when it is dropped, if the run has put nothing there.
#[derive(Debug)]
pub struct OutputLock {
    file: File,
    dir: PathBuf,
    /// What was made for it, from the outside in.
    made: Vec<PathBuf>,
}

impl OutputLock {
    /// Makes `dir` where it is not there, and takes its lock.
    ///
    /// # Errors
    /// [`Error::Transient`] if another run holds it, [`Error::Write`] if directory or file cannot be made. No new
    /// directory is left then.
    pub fn acquire(dir: &Path) -> Result<Self> {
        let mut made = Vec::new();
        let file = make(dir, &mut made).and_then(|()| lock(dir));
        match file {
            Ok(file) => Ok(Self {
                file,
                dir: dir.to_path_buf(),
                made,
            }),
            Err(error) => {
                remove_empty(&made);
                Err(error)
            }
        }
    }

    /// Whether the directory holds this lock and nothing else.
    fn is_alone(&self) -> bool {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return false;
        };
        let mut others =
            entries.filter(|entry| !entry.as_ref().is_ok_and(|e| e.file_name() == NAME));
        others.next().is_none() && is_at(&self.file, &self.dir.join(NAME))
    }
}

impl Drop for OutputLock {
    fn drop(&mut self) {
        // Still locked: who comes now is refused, or makes a file of its own, with which the directory stays.
        if !self.made.is_empty()
            && self.is_alone()
            && std::fs::remove_file(self.dir.join(NAME)).is_ok()
        {
            remove_empty(&self.made);
        }
    }
}

/// Makes `dir` and those around it, and says in `made` which of them were not there.
fn make(dir: &Path, made: &mut Vec<PathBuf>) -> Result<()> {
    let missing: Vec<&Path> = dir
        .ancestors()
        .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
        .collect();
    for path in missing.into_iter().rev() {
        match std::fs::create_dir(path) {
            Ok(()) => made.push(path.to_path_buf()),
            // Another process was faster: it is that one's.
            Err(_) if path.is_dir() => {}
            Err(error) => return Err(Error::write(dir)(error)),
        }
    }
    Ok(())
}

/// Removes directories, from the inside out, up to one that is not empty.
fn remove_empty(made: &[PathBuf]) {
    for path in made.iter().rev() {
        if std::fs::remove_dir(path).is_err() {
            break;
        }
    }
}

/// Opens and locks the file in `dir`.
fn lock(dir: &Path) -> Result<File> {
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
    // Its holder may have removed it in the meantime.
    if !is_at(&file, &path) {
        return Err(taken(dir, &file));
    }
    let note = format!("process {}\n", std::process::id());
    file.set_len(0)
        .and_then(|()| file.write_all(note.as_bytes()))
        .map_err(Error::write(&path))?;
    Ok(file)
}

/// Whether `path` is the path of `file`.
fn is_at(file: &File, path: &Path) -> bool {
    let [ours, theirs] = [file.metadata(), std::fs::metadata(path)];
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
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

    #[test]
    fn a_new_directory_goes_again_if_nothing_was_put_there() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (outer, inner) = (dir.path().join("a"), dir.path().join("a/b"));
        let lock = OutputLock::acquire(&inner).expect("free");
        assert!(inner.join(NAME).is_file());
        // A second run that fails takes nothing away.
        OutputLock::acquire(&inner).expect_err("taken");
        assert!(inner.join(NAME).is_file());
        drop(lock);
        assert!(!outer.exists() && dir.path().is_dir());
    }

    #[test]
    fn a_directory_with_something_in_it_or_that_was_there_stays() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (new, old) = (dir.path().join("new"), dir.path().join("old"));
        let lock = OutputLock::acquire(&new).expect("free");
        std::fs::write(new.join("file"), "").expect("writable");
        drop(lock);
        assert!(new.join(NAME).is_file() && new.join("file").is_file());
        std::fs::create_dir(&old).expect("writable");
        drop(OutputLock::acquire(&old).expect("free"));
        assert!(old.join(NAME).is_file());
    }

    #[test]
    fn a_lock_that_is_no_longer_at_its_path_is_none() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(NAME);
        let file = open(&path).expect("writable");
        assert!(is_at(&file, &path));
        std::fs::remove_file(&path).expect("there");
        assert!(!is_at(&file, &path));
        std::fs::write(&path, "").expect("writable");
        assert!(!is_at(&file, &path));
    }
}
