//! What a name stands for: a path here, or files of the hub.

use super::{Kind, Repository, Settings, directory};
use ferrotune_core::{Error, Result};
use std::path::{Path, PathBuf};

/// The directory of a model: `name` itself, or where the files of `owner/name` or `owner/name@revision` on the
/// hub are, fetched if they have to be.
///
/// # Errors
/// [`Error::Config`] about `key` for a name that is neither, for a repository or revision that does not exist
/// or may not be read, and for one that is not in the cache and may not be fetched; [`Error::Transient`] when
/// the hub cannot be reached; [`Error::Data`] when it answers nonsense.
pub fn model(name: &str, revision: Option<&str>, key: &str) -> Result<PathBuf> {
    find(Kind::Model, "a Hugging Face model", name, revision, key)
}

/// The directory of an adapter, found as [`model`] finds a model.
///
/// # Errors
/// As there.
pub fn adapter(name: &str, key: &str) -> Result<PathBuf> {
    find(Kind::Adapter, "an adapter", name, None, key)
}

/// The file or directory of rows that `name` stands for, of which the files of `splits` are wanted: `name`
/// itself, or files of the hub.
///
/// # Errors
/// As for [`model`], but a name that can be no data set on the hub is given back: it is a path, and whoever
/// reads it says what it lacks.
pub(crate) fn rows(name: &str, splits: &[String], key: &str) -> Result<PathBuf> {
    let path = PathBuf::from(name);
    let splits = splits.to_vec();
    match Repository::named(Kind::Dataset { splits }, name, None) {
        Some(repository) if !path.exists() => directory(&Settings::from_env(), &repository, key),
        _ => Ok(path),
    }
}

fn find(kind: Kind, what: &str, name: &str, revision: Option<&str>, key: &str) -> Result<PathBuf> {
    if Path::new(name).is_dir() {
        return Ok(name.into());
    }
    match Repository::named(kind, name, revision) {
        Some(repository) => directory(&Settings::from_env(), &repository, key),
        None => Err(Error::config(
            key,
            format!(
                "`{name}` is not a directory, and no name on the Hugging Face hub, such as owner/name; expected \
                 {what}"
            ),
        )),
    }
}
