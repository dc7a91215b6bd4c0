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
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
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

/// Writes `path` through `fill`: temporary file, flush to disk, rename, flush of the directory.
/// The permissions follow the umask. On error nothing is left behind and the old file stays.
pub(super) fn write_file_with(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<()> {
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

/// The name that a directory had before [`set_aside`].
fn replaced_name(name: &str) -> Option<&str> {
    let (original, _) = name.strip_prefix('.')?.split_once(REPLACED)?;
    (!original.is_empty()).then_some(original)
}
