//! Writes that are either whole or not there.

use crate::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// First part of every temporary name of ours.
const PREFIX: &str = ".ferrotune-";
/// Last part of every temporary name of ours.
const SUFFIX: &str = ".tmp";
/// Between a name and its temporary tail, while another directory takes the name.
const REPLACED: &str = ".replaced-by-ferrotune-";

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Process id and a number: different for every call.
fn unique_tail() -> String {
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{}-{n}", std::process::id())
}

/// Makes something new under a hidden temporary name in `dir`. A name left over by an earlier
/// process of the same id is passed over, and a planted link is never followed.
pub(super) fn create_temporary<T>(
    dir: &Path,
    create: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<(PathBuf, T)> {
    loop {
        let path = dir.join(format!("{PREFIX}{}{SUFFIX}", unique_tail()));
        match create(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(made) => return Ok((path, made)),
        }
    }
}

/// The directory that `path` lies in.
pub(super) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Flushes a directory, so that names made or changed in it survive a power cut.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    match File::open(dir)?.sync_all() {
        // Some network file systems know no such thing; the rename is all they offer.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// A device or a pipe of that name is no file to put another one in place of.
fn refuse_special(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(about) if !about.is_file() => {
            let what = if about.is_dir() {
                "a directory"
            } else {
                "no regular file"
            };
            Err(io::Error::other(format!("is {what}; give another name")))
        }
        _ => Ok(()),
    }
}

/// Writes `path` through `fill`: temporary file, flush to disk, rename, flush of the directory.
/// The permissions follow the umask. On error nothing is left behind and the old file stays.
///
/// # Errors
/// [`Error::Write`], with what `fill` returned.
pub fn write_file_with(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    refuse_special(path).map_err(Error::write(path))?;
    let dir = parent_of(path);
    let (temporary, mut file) = create_temporary(dir, |p| {
        OpenOptions::new().write(true).create_new(true).open(p)
    })
    .map_err(Error::write(path))?;
    let written = fill(&mut file)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| sync_dir(dir));
    written.map_err(|e| {
        // After the rename there is nothing to remove; before it, the first error matters more.
        let _ = fs::remove_file(&temporary);
        Error::write(path)(e)
    })
}

/// Writes a small file so that readers see the old bytes or the new ones, even after a crash.
///
/// # Errors
/// [`Error::Write`]; the old file, if any, is untouched.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file_with(path, |file| file.write_all(bytes))
}

/// Checks that files can be made in `dir`, creating it if needed: better told now than after the
/// first thousand steps.
///
/// # Errors
/// [`Error::Write`] with the directory and the reason.
pub fn probe_writable(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::write(dir))?;
    let (path, mut file) = create_temporary(dir, |p| {
        OpenOptions::new().write(true).create_new(true).open(p)
    })
    .map_err(Error::write(dir))?;
    let written = file.write_all(b"probe").and_then(|()| file.sync_all());
    drop(file);
    let removed = fs::remove_file(&path);
    written.and(removed).map_err(Error::write(dir))
}

/// Moves a directory out of the way under a name from which [`remove_stale`] can bring it back.
pub(super) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = parent_of(path).join(format!(".{name}{REPLACED}{}", unique_tail()));
    fs::rename(path, &aside)?;
    Ok(aside)
}

/// Removes a directory so that a crash leaves it whole or under a hidden name, never half.
pub(crate) fn remove_dir(path: &Path) -> io::Result<()> {
    let dir = parent_of(path);
    let (hidden, ()) = create_temporary(dir, |p| fs::create_dir(p))?;
    fs::rename(path, hidden.join("removed"))?;
    sync_dir(dir)?;
    fs::remove_dir_all(&hidden)
}

/// Removes what a killed process left in `dir` and brings back a directory that was being replaced.
///
/// Call it before work starts, while nobody else writes there. Links are removed, not followed.
///
/// # Errors
/// [`Error::Read`] if the directory cannot be listed, [`Error::Write`] if something cannot be
/// removed.
pub fn remove_stale(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::read(dir)(e)),
    };
    let mut stale = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::read(dir))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let path = entry.path();
        if let Some(original) = replaced_name(name) {
            let original = dir.join(original);
            if !original.exists() {
                fs::rename(&path, &original).map_err(Error::write(&original))?;
                continue;
            }
        } else if !(name.starts_with(PREFIX) && name.ends_with(SUFFIX)) {
            continue;
        }
        let is_dir = entry.file_type().map_err(Error::read(&path))?.is_dir();
        let removed = if is_dir {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(Error::write(&path))?;
        stale.push(path);
    }
    stale.sort();
    Ok(stale)
}

/// Whether [`remove_stale`] would bring back a directory in `dir`. Changes nothing.
#[must_use]
pub fn holds_set_aside(dir: &Path) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let was_replaced = |name: &str| replaced_name(name).is_some_and(|n| !dir.join(n).exists());
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .any(|name| was_replaced(&name))
}

/// The name that a directory had before [`set_aside`].
fn replaced_name(name: &str) -> Option<&str> {
    let (original, _) = name.strip_prefix('.')?.split_once(REPLACED)?;
    (!original.is_empty()).then_some(original)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExitCode;
    use crate::io::StagedDir;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).expect("readable");
        let name = |e: io::Result<fs::DirEntry>| e.expect("entry").file_name();
        entries
            .map(|e| name(e).to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn a_written_file_replaces_the_old_one_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("f");
        for text in ["a longer text", "short", ""] {
            write_file(&path, text.as_bytes()).expect("writable");
            assert_eq!(fs::read_to_string(&path).expect("readable"), text);
        }
        assert_eq!(names(dir.path()), ["f"]);
    }

    #[test]
    fn a_failed_write_keeps_the_old_file() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("f");
        write_file(&path, b"old").expect("writable");
        let full = |file: &mut File| {
            file.write_all(b"new")?;
            Err(io::ErrorKind::StorageFull.into())
        };
        let error = write_file_with(&path, full).expect_err("full");
        assert_eq!(error.exit_code(), ExitCode::CannotWrite);
        assert_eq!(fs::read(&path).expect("readable"), b"old");
        assert_eq!(names(dir.path()), ["f"]);
    }

    #[cfg(unix)]
    #[test]
    fn permissions_follow_the_umask() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("temporary directory");
        let mode = |name: &str| {
            let about = fs::metadata(dir.path().join(name)).expect("there");
            about.permissions().mode() & 0o777
        };
        fs::write(dir.path().join("plain"), "").expect("writable");
        fs::create_dir(dir.path().join("plain_dir")).expect("writable");
        write_file(&dir.path().join("ours"), b"").expect("writable");
        StagedDir::create(dir.path().join("our_dir"))
            .and_then(StagedDir::publish)
            .expect("writable");
        assert_eq!(mode("ours"), mode("plain"));
        assert_eq!(mode("our_dir"), mode("plain_dir"));
    }

    #[cfg(unix)]
    #[test]
    fn a_planted_link_is_replaced_not_followed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let target = dir.path().join("target");
        fs::write(&target, "untouched").expect("writable");
        let path = dir.path().join("f");
        std::os::unix::fs::symlink(&target, &path).expect("linkable");
        write_file(&path, b"new").expect("writable");
        assert_eq!(fs::read(&target).expect("readable"), b"untouched");
        assert!(!path.is_symlink());
    }

    #[test]
    fn probing_makes_the_directory_and_leaves_it_empty() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let output = dir.path().join("a/b");
        probe_writable(&output).expect("writable");
        assert!(names(&output).is_empty());
    }

    #[test]
    fn an_output_directory_below_a_file_is_not_writable() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("file");
        fs::write(&file, "").expect("writable");
        for output in [file.clone(), file.join("out")] {
            let error = probe_writable(&output).expect_err("a file is in the way");
            assert_eq!(error.exit_code(), ExitCode::CannotWrite);
            assert!(error.to_string().contains("file"), "{error}");
        }
        assert!(write_file(&file.join("x"), b"").is_err());
        assert!(StagedDir::create(file.join("x")).is_err());
    }

    #[test]
    fn a_staged_directory_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let target = dir.path().join("out");
        let staged = StagedDir::create(&target).expect("writable");
        fs::write(staged.path().join("f"), "1").expect("writable");
        assert!(!target.exists());
        drop(staged);
        assert!(names(dir.path()).is_empty(), "dropped is removed");
        for text in ["1", "2"] {
            let staged = StagedDir::create(&target).expect("writable");
            fs::write(staged.path().join("f"), text).expect("writable");
            staged.publish().expect("writable");
            assert_eq!(
                fs::read_to_string(target.join("f")).expect("readable"),
                text
            );
            assert_eq!(names(dir.path()), ["out"]);
        }
    }
}
