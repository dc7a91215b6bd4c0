//! Files that a name stands for.

use ferrotune_core::{Error, Result};
use std::path::{Path, PathBuf};

/// What files of rows end with.
const ENDINGS: [&str; 7] = [
    ".jsonl",
    ".json",
    ".jsonl.gz",
    ".json.gz",
    ".jsonl.zst",
    ".json.zst",
    ".parquet",
];

/// The files of each name. A name is a file, or a directory with `SPLIT.jsonl` in it, or other files of
/// rows named after the split, in it or in its `data`, as data sets of the Hugging Face hub have them.
pub(super) fn named(names: &[String], split: &str, key: &str) -> Result<Vec<Vec<PathBuf>>> {
    let resolve = |name: &String| {
        let path = PathBuf::from(name);
        if path.is_file() {
            return Ok(vec![path]);
        }
        let found = [path.clone(), path.join("data")]
            .iter()
            .map(|directory| of_split(directory, split))
            .find(|files| !files.is_empty());
        found.ok_or_else(|| {
            Error::config(
                key,
                format!(
                    "`{name}` is neither a file of rows nor a directory with {split}.jsonl (or .gz, \
                     .zst or .parquet)"
                ),
            )
        })
    };
    names.iter().map(resolve).collect()
}

/// Refuses pipes and devices: a run reads its rows more than once, and a pipe may have no end.
pub(super) fn require_files(files: &[PathBuf]) -> Result<()> {
    let special = |path: &&PathBuf| {
        let metadata = path.metadata();
        metadata.is_ok_and(|m| !m.is_file() && !m.is_dir())
    };
    match files.iter().find(special) {
        None => Ok(()),
        Some(path) => Err(Error::data(
            path,
            None,
            "is a pipe or a device, and a run reads its rows more than once; write them to a file",
        )),
    }
}

/// `SPLIT.ENDING`, or else all of `SPLIT-*.ENDING`, sorted.
fn of_split(directory: &Path, split: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file() && is_of_split(path, split))
        .collect();
    files.sort();
    let whole = files.iter().position(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        ENDINGS
            .iter()
            .any(|ending| name == format!("{split}{ending}"))
    });
    match whole {
        Some(i) => vec![files.swap_remove(i)],
        None => files,
    }
}

/// Whether a file is of a split by its name.
pub(crate) fn is_of_split(path: &Path, split: &str) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let rest = name.strip_prefix(split);
    let stem = rest.and_then(|rest| ENDINGS.iter().find_map(|ending| rest.strip_suffix(ending)));
    stem.is_some_and(|stem| stem.is_empty() || stem.starts_with('-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_twice_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        let paths = [file.path().to_path_buf(), PathBuf::from("/dev/zero")];
        assert!(require_files(&paths[..1]).is_ok());
        let error = require_files(&paths).expect_err("a device").to_string();
        assert!(
            error.contains("/dev/zero: is a pipe or a device"),
            "{error}"
        );
        // What is not there is told by whoever reads it.
        assert!(require_files(&[PathBuf::from("/nowhere")]).is_ok());
    }

    #[test]
    fn a_directory_has_one_file_or_shards_per_split() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let write = |name: &str| std::fs::write(directory.path().join(name), "").expect("writable");
        let name = vec![directory.path().display().to_string()];
        let found = |split: &str| -> Vec<String> {
            let files = named(&name, split, "dataset_name")
                .unwrap_or_default()
                .concat();
            let file_name = |p: &PathBuf| p.file_name().map(|n| n.to_string_lossy().into_owned());
            files.iter().filter_map(file_name).collect()
        };
        assert!(found("train").is_empty());
        std::fs::create_dir(directory.path().join("data")).expect("writable");
        write("data/train-00001-of-00002.parquet");
        write("data/train-00000-of-00002.parquet");
        write("data/train_extra.jsonl");
        assert_eq!(
            found("train"),
            [
                "train-00000-of-00002.parquet",
                "train-00001-of-00002.parquet"
            ]
        );
        write("train.jsonl.gz");
        assert_eq!(found("train"), ["train.jsonl.gz"]);
        assert!(found("test").is_empty());
    }
}
