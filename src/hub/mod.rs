//! Models and data sets by their names on the Hugging Face hub.
//!
//! The cache is that of huggingface_hub, in both directions: what it fetched is found, and what is
//! fetched here it finds. Nothing that a server says becomes a path before it was looked at.

mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
mod named;
mod repository;

pub(crate) use named::rows;
pub use named::{adapter, model};

use repository::{Kind, Repository};

use cache::Cache;
use ferrotune_core::{Error, Result};
use std::path::PathBuf;

/// What the environment says, by the names that huggingface_hub gives it.
#[derive(Clone, Debug)]
struct Settings {
    /// `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else in the user's cache folder.
    cache: PathBuf,
    /// `HF_ENDPOINT`.
    #[cfg(feature = "hub")]
    endpoint: String,
    /// `HF_TOKEN`, else the file `token` in `HF_HOME`.
    #[cfg(feature = "hub")]
    token: Option<String>,
    /// `HF_HUB_OFFLINE`.
    offline: bool,
}

impl Settings {
    fn from_env() -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let user = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let user = user.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
        let home = variable("HF_HOME").map(PathBuf::from);
        let home = home.unwrap_or_else(|| user.unwrap_or_default().join("huggingface"));
        let offline = variable("HF_HUB_OFFLINE").unwrap_or_default();
        Self {
            cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            #[cfg(feature = "hub")]
            endpoint: variable("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".to_owned())
                .trim_end_matches('/')
                .to_owned(),
            #[cfg(feature = "hub")]
            token: variable("HF_TOKEN")
                .or_else(|| std::fs::read_to_string(home.join("token")).ok())
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            offline: ["1", "true", "yes", "on"].contains(&offline.to_lowercase().as_str()),
        }
    }
}

/// A directory with the files of a repository: fetched, or as the cache has them.
///
/// # Errors
/// [`Error::Config`] about `key` for a repository or revision that does not exist or may not be read, or
/// that is not in the cache and may not be fetched; [`Error::Transient`] when the hub cannot be reached;
/// [`Error::Data`] when it answers nonsense.
fn directory(settings: &Settings, repository: &Repository, key: &str) -> Result<PathBuf> {
    let cache = Cache::of(&settings.cache, repository);
    #[cfg(feature = "hub")]
    if !settings.offline {
        return download::snapshot(settings, repository, &cache, key);
    }
    cache.snapshot(&repository.revision).ok_or_else(|| {
        let why = if settings.offline {
            "HF_HUB_OFFLINE is set; unset it, or fetch it before"
        } else {
            "this build has no hub (feature `hub`); fetch it before, or give a directory"
        };
        Error::config(
            key,
            format!(
                "`{repository}` is no directory, and the cache in {} does not hold it, while {why}",
                settings.cache.display()
            ),
        )
    })
}
