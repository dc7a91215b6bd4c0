//! Names on the hub.

use std::fmt;
use std::path::Path;

/// What a repository holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A model: configuration, tokenizer, weights.
    Model,
    /// What was trained over a model, in PEFT's files.
    Adapter,
    /// Rows, of which the files of these splits are wanted.
    Dataset { splits: Vec<String> },
}

/// A repository at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Repository {
    pub(crate) kind: Kind,
    /// `owner/name`.
    pub(crate) id: String,
    /// A branch, a tag or a commit.
    pub(crate) revision: String,
}

impl Repository {
    /// What a name stands for that is no file or directory: `owner/name`, or `owner/name@revision`.
    /// Nothing where it can be neither, or where `owner` is a directory here: then a path was meant.
    pub(crate) fn named(kind: Kind, name: &str, revision: Option<&str>) -> Option<Self> {
        let (id, at) = match name.split_once('@') {
            Some((id, at)) => (id, Some(at)),
            None => (name, None),
        };
        let (owner, rest) = id.split_once('/')?;
        let is_word = |word: &str| {
            (1..=96).contains(&word.len())
                && word
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !word.starts_with(['.', '-'])
                && !word.ends_with(['.', '-'])
                && !word.contains("..")
        };
        let revision = at.or(revision).unwrap_or("main");
        let is_id = is_word(owner) && is_word(rest) && !Path::new(owner).is_dir();
        (is_id && is_revision(revision)).then(|| Self {
            kind,
            id: id.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Its directory in the cache.
    pub(super) fn folder(&self) -> String {
        let kind = match self.kind {
            Kind::Model | Kind::Adapter => "models",
            Kind::Dataset { .. } => "datasets",
        };
        format!("{kind}--{}", self.id.replace('/', "--"))
    }
}

/// Names of branches and tags, such as `refs/pr/1`, none of which leads out of a directory.
fn is_revision(revision: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
    };
    revision.len() <= 200 && revision.split('/').all(is_part)
}

/// Whether a revision is a commit.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| c.is_ascii_hexdigit())
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.id),
            revision => write!(f, "{}@{revision}", self.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ids_or_paths() {
        let named = |name: &str| Repository::named(Kind::Model, name, None);
        let found = named("owner/Name-1.5_x").expect("an id");
        assert_eq!(
            (found.id.as_str(), found.revision.as_str()),
            ("owner/Name-1.5_x", "main")
        );
        assert_eq!(found.folder(), "models--owner--Name-1.5_x");
        let pinned = named("owner/name@refs/pr/1").expect("an id");
        assert_eq!(pinned.revision, "refs/pr/1");
        for path in [
            "name",
            "/owner/name",
            "./name",
            "../name",
            "a/b/c",
            "a/",
            "/b",
            "a/..",
            "a/b c",
            "a/b@",
            "src/nothing",
            "a/b@../c",
            "a/b@/c",
            "a/b@.",
            "a\\b/c",
            "",
        ] {
            assert_eq!(named(path), None, "{path}");
        }
        assert_eq!(Repository::named(Kind::Model, "a/b", Some("../..")), None);
    }
}
