//! A repository from the hub into the cache.

use super::Settings;
use super::cache::Cache;
use super::client::{Client, Fault, Listing};
use super::repository::{Kind, Repository, is_commit};
use crate::recipe::is_of_split;
use ferrotune_core::checkpoint::BASE_RECORD;
use ferrotune_core::io::write_file;
use ferrotune_core::{Error, Result};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Files of a model or an adapter beside its weights.
const MODEL_FILES: [&str; 14] = [
    "adapter_config.json",
    "added_tokens.json",
    BASE_RECORD,
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// The files of a repository that are wanted, in the cache.
pub(super) fn snapshot(
    settings: &Settings,
    repository: &Repository,
    cache: &Cache,
    key: &str,
) -> Result<PathBuf> {
    let client = Client::new(settings, repository);
    let listing = match client.listing() {
        Ok(listing) => listing,
        Err(Fault::Transient(reason)) => {
            let Some(path) = cache.snapshot(&repository.revision) else {
                return Err(transient(&reason));
            };
            tracing::warn!(
                "{reason}; going on with {}, as it was fetched before",
                path.display()
            );
            return Ok(path);
        }
        Err(fault) => return Err(explain(fault, repository, key)),
    };
    let wanted = wanted(repository, &listing, key)?;
    let directory = cache.commit(&listing.commit);
    std::fs::create_dir_all(&directory).map_err(Error::write(&directory))?;
    let lock = lock(&cache.directory)?;
    for name in wanted {
        let path = directory.join(name);
        if path.is_file() {
            continue;
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(Error::write(parent))?;
        }
        tracing::info!("fetching {name} of {repository}");
        let fetched = client.fetch(&listing.commit, name, &path);
        fetched.map_err(|fault| explain(fault, repository, key))?;
    }
    if !is_commit(&repository.revision) {
        let reference = cache.reference(&repository.revision);
        if let Some(parent) = reference.parent() {
            std::fs::create_dir_all(parent).map_err(Error::write(parent))?;
        }
        write_file(&reference, listing.commit.as_bytes())?;
    }
    drop(lock);
    Ok(directory)
}

/// Held while files are fetched: of the ranks of a machine one fetches, and the others find them.
fn lock(directory: &Path) -> Result<File> {
    let path = directory.join(".ferrotune.lock");
    let file = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(&path);
    let file = file.map_err(Error::write(&path))?;
    file.lock().map_err(Error::write(&path))?;
    Ok(file)
}

fn wanted<'l>(repository: &Repository, listing: &'l Listing, key: &str) -> Result<Vec<&'l str>> {
    let names = listing.files.iter().map(String::as_str);
    let is_wanted = |name: &&str| match &repository.kind {
        Kind::Model | Kind::Adapter => {
            let is_weights = Path::new(name)
                .extension()
                .is_some_and(|e| e == "safetensors");
            !name.contains('/') && (is_weights || MODEL_FILES.contains(name))
        }
        Kind::Dataset { splits } => {
            let name = name.strip_prefix("data/").unwrap_or(name);
            !name.contains('/')
                && splits
                    .iter()
                    .any(|split| is_of_split(Path::new(name), split))
        }
    };
    let wanted: Vec<&str> = names.filter(is_wanted).collect();
    let lacks = match &repository.kind {
        Kind::Model if !wanted.contains(&"config.json") => {
            "config.json, so it is no model".to_owned()
        }
        Kind::Adapter if !wanted.contains(&"adapter_config.json") => {
            "adapter_config.json, so it is no adapter".to_owned()
        }
        Kind::Model | Kind::Adapter
            if !wanted.iter().any(|name| name.ends_with(".safetensors")) =>
        {
            "weights as safetensors; convert it, because pickled weights are never read".to_owned()
        }
        Kind::Dataset { splits } if wanted.is_empty() => {
            format!(
                "file of rows (JSON Lines or parquet) of the split {}",
                splits.join(" or ")
            )
        }
        _ => return Ok(wanted),
    };
    Err(Error::config(
        key,
        format!("`{repository}` on the hub has no {lacks}"),
    ))
}

fn transient(reason: &str) -> Error {
    Error::Transient {
        message: format!("the hub cannot be reached: {reason}"),
    }
}

fn explain(fault: Fault, repository: &Repository, key: &str) -> Error {
    match fault {
        Fault::Transient(reason) => transient(&reason),
        Fault::Refused(reason) => Error::config(
            key,
            format!("`{repository}` is no directory here and cannot be had from the hub: {reason}"),
        ),
        Fault::Other(error) => error,
    }
}
