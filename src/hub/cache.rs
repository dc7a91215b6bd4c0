//! The layout of huggingface_hub's cache.
//!
//! ```text
//! models--OWNER--NAME/refs/REVISION        the commit
//! models--OWNER--NAME/snapshots/COMMIT/    its files, or links to them
//! ```

use super::repository::{Repository, is_commit};
use std::path::{Path, PathBuf};

/// A repository in the cache.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    pub(super) directory: PathBuf,
}

impl Cache {
    pub(super) fn of(root: &Path, repository: &Repository) -> Self {
        Self {
            directory: root.join(repository.folder()),
        }
    }

    /// Where the files of a commit are.
    pub(super) fn commit(&self, commit: &str) -> PathBuf {
        self.directory.join("snapshots").join(commit)
    }

    /// Where the commit of a revision is written.
    pub(super) fn reference(&self, revision: &str) -> PathBuf {
        self.directory.join("refs").join(revision)
    }

    /// The files of a revision, if they are there.
    pub(super) fn snapshot(&self, revision: &str) -> Option<PathBuf> {
        let commit = if is_commit(revision) {
            revision.to_owned()
        } else {
            let text = std::fs::read_to_string(self.reference(revision)).ok()?;
            Some(text.trim().to_owned()).filter(|commit| is_commit(commit))?
        };
        Some(self.commit(&commit)).filter(|path| path.is_dir())
    }
}
