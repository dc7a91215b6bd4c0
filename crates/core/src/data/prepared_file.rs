//! Prepared rows in a file, named by a hash of everything they depend on.
//!
//! ```text
//! magic, (token id, label)*, (length, trained tokens)*, JSON, number of examples, bytes of JSON, BLAKE3
//! ```
//!
//! A file is written under a temporary name while rows are prepared, so memory holds none of their
//! tokens, and renamed when it is whole. One that is damaged, or of other rows than its name says, is
//! made anew.

use crate::data::dataset::Dataset;
use crate::data::examples::{Examples, TokenFile};
use crate::data::prepare::{PrepareOptions, PrepareReport};
use crate::data::record::RecordKind;
use crate::data::tokenizer::Tokenizer;
use crate::io::{blake3_of_bytes, blake3_of_file, blake3_of_files, read_exact_at};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"FERRTOK4";
const DIGEST: u64 = 32;
/// The two numbers before the digest.
const NUMBERS: u64 = 16;
const BUFFER: usize = 1 << 20;

/// What a file says of its examples.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    key: String,
    report: PrepareReport,
    kind: Option<RecordKind>,
    file_ends: Vec<usize>,
}

/// The hash of what prepared rows depend on: version, tokenizer, chat templates, settings, and the bytes
/// of every file, with its name, which messages show.
///
/// # Errors
/// [`Error::Read`].
pub(super) fn key(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    options: &PrepareOptions,
) -> Result<String> {
    let mut parts = vec![env!("CARGO_PKG_VERSION").to_owned(), format!("{options:?}")];
    for file in tokenizer.files() {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        parts.push(format!("{name} {}", blake3_of_file(file)?.0));
    }
    parts.extend(tokenizer.chat_template_sources().map(str::to_owned));
    for (file, (digest, _)) in files.iter().zip(blake3_of_files(files)?) {
        parts.push(format!("{} {digest}", file.display()));
    }
    // Each part by its own hash: no two lists of parts are one text.
    let parts = parts.iter().map(|part| blake3_of_bytes(part.as_bytes()));
    Ok(blake3_of_bytes(parts.collect::<String>().as_bytes()))
}

/// Writes and hashes.
struct Hashed<W> {
    inner: W,
    hasher: blake3::Hasher,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a file: `prepare` gives its tokens to the writer, and then says what they are.
///
/// # Errors
/// Those of writing, and of `prepare`.
pub(super) fn write(
    file: &mut File,
    key: &str,
    prepare: impl FnOnce(&mut dyn Write) -> Result<(Dataset, Vec<[u32; 2]>)>,
) -> io::Result<Result<()>> {
    let hashed = Hashed {
        inner: file,
        hasher: blake3::Hasher::new(),
    };
    let mut writer = BufWriter::with_capacity(BUFFER, hashed);
    writer.write_all(&MAGIC)?;
    let (dataset, sizes) = match prepare(&mut writer) {
        Ok(prepared) => prepared,
        Err(error) => return Ok(Err(error)),
    };
    let about = serde_json::to_vec(&About {
        key: key.to_owned(),
        report: dataset.report,
        kind: dataset.kind,
        file_ends: dataset.file_ends,
    })?;
    writer.write_all(bytemuck::cast_slice(&sizes))?;
    writer.write_all(&about)?;
    writer.write_all(&(sizes.len() as u64).to_le_bytes())?;
    writer.write_all(&(about.len() as u64).to_le_bytes())?;
    let hashed = writer
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?;
    let digest = hashed.hasher.finalize();
    hashed.inner.write_all(digest.as_bytes())?;
    Ok(Ok(()))
}

/// The examples of a file, which stay there; nothing if there is no file.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn open(path: &Path, key: &str) -> std::result::Result<Option<Dataset>, String> {
    match File::open(path) {
        Ok(file) => read(file, path, key).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.to_string()),
    }
}

fn read(file: File, path: &Path, key: &str) -> std::result::Result<Dataset, String> {
    let said = |e: io::Error| e.to_string();
    let length = file.metadata().map_err(said)?.len();
    let mut magic = [0; 8];
    let least = MAGIC.len() as u64 + NUMBERS + DIGEST;
    let is_ours = length >= least && read_exact_at(&file, &mut magic, 0).is_ok() && magic == MAGIC;
    if !is_ours {
        return Err("it is no file of prepared rows".into());
    }
    let hashed = length - DIGEST;
    let mut digest = [0; DIGEST as usize];
    read_exact_at(&file, &mut digest, hashed).map_err(said)?;
    let mut hasher = blake3::Hasher::new();
    let mut start = BufReader::with_capacity(BUFFER, &file).take(hashed);
    io::copy(&mut start, &mut hasher).map_err(said)?;
    if *hasher.finalize().as_bytes() != digest {
        return Err("it is damaged: its bytes do not have its digest".into());
    }
    let mut numbers = [0_u64; 2];
    let at = hashed - NUMBERS;
    read_exact_at(&file, bytemuck::cast_slice_mut(&mut numbers), at).map_err(said)?;
    let [examples, bytes] = numbers;
    let about_at = at.checked_sub(bytes);
    let sizes_at = about_at.and_then(|at| at.checked_sub(examples.checked_mul(8)?));
    let (Some(about_at), Some(sizes_at)) = (about_at, sizes_at) else {
        return Err("its numbers do not fit its length".into());
    };
    let mut about = vec![0; bytes as usize];
    read_exact_at(&file, &mut about, about_at).map_err(said)?;
    let about: About = serde_json::from_slice(&about).map_err(|e| e.to_string())?;
    if about.key != key {
        return Err("it holds other rows than its name says".into());
    }
    let mut sizes = vec![[0_u32; 2]; examples as usize];
    read_exact_at(&file, bytemuck::cast_slice_mut(&mut sizes), sizes_at).map_err(said)?;
    let tokens: u64 = sizes.iter().map(|size| u64::from(size[0])).sum();
    if tokens * 8 + MAGIC.len() as u64 != sizes_at {
        return Err("its lengths do not fit its tokens".into());
    }
    let file = TokenFile {
        file,
        path: path.to_path_buf(),
        first_byte: MAGIC.len() as u64,
    };
    Ok(Dataset {
        examples: Examples::in_file(file, sizes.into_iter()),
        report: about.report,
        kind: about.kind,
        file_ends: about.file_ends,
    })
}

/// The error of a file that was written just now and cannot be read.
pub(super) fn unreadable(path: &Path, reason: Option<String>) -> Error {
    let reason = reason.unwrap_or_else(|| "it is gone".into());
    Error::read(path)(io::Error::other(reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixtures::repository;

    const ROWS: usize = 5000;

    struct Bench {
        directory: tempfile::TempDir,
        tokenizer: Tokenizer,
        options: PrepareOptions,
    }

    impl Bench {
        fn new() -> Self {
            let directory = tempfile::tempdir().expect("a temporary directory can be made");
            let row = |i: usize| format!("{{\"text\": \"hello {i} world\"}}\n");
            let rows: String = (0..ROWS).map(row).collect();
            std::fs::write(directory.path().join("rows.jsonl"), rows).expect("writable");
            Self {
                directory,
                tokenizer: Tokenizer::from_dir(&repository().join("tokenizers/bpe_llama3"))
                    .expect("the tokenizer loads"),
                options: PrepareOptions::default(),
            }
        }

        fn files(&self) -> [PathBuf; 1] {
            [self.directory.path().join("rows.jsonl")]
        }

        fn cache(&self) -> PathBuf {
            self.directory.path().join("cache/of rows")
        }

        fn load(&self) -> Dataset {
            Dataset::load_cached(&self.files(), &self.tokenizer, &self.options, &self.cache())
                .expect("the rows are fine")
        }

        fn entries(&self) -> Vec<PathBuf> {
            let entries = std::fs::read_dir(self.cache()).expect("readable");
            let mut paths: Vec<_> = entries.map(|e| e.expect("readable").path()).collect();
            paths.sort();
            paths
        }
    }

    #[test]
    fn a_data_set_in_a_file_is_the_one_in_memory_and_memory_holds_none_of_its_tokens() {
        let bench = Bench::new();
        let held = Dataset::load(&bench.files(), &bench.tokenizer, &bench.options).expect("fine");
        for _ in 0..2 {
            let filed = bench.load();
            assert_eq!(filed.examples.len(), ROWS);
            assert_eq!(filed.examples.tokens_in_memory(), 0);
            assert_eq!(held.examples.tokens_in_memory() as u64, held.report.tokens);
            let vec = |d: &Dataset| d.examples.to_vec().expect("readable");
            assert_eq!(vec(&filed), vec(&held));
            assert_eq!((&filed.report, filed.kind), (&held.report, held.kind));
            assert_eq!(filed.file_ends, held.file_ends);
            assert!(filed.examples.lengths().eq(held.examples.lengths()));
        }
        assert_eq!(bench.entries().len(), 1, "nothing is left beside it");
    }

    #[test]
    fn everything_that_rows_depend_on_makes_another_entry() {
        let mut bench = Bench::new();
        bench.load();
        bench.options.max_length = Some(2);
        assert_eq!(bench.load().report.longest, 2);
        bench.tokenizer.set_chat_template("x").expect("it compiles");
        bench.load();
        assert_eq!(bench.entries().len(), 3);
        std::fs::write(&bench.files()[0], "{\"text\": \"another\"}\n").expect("writable");
        assert_eq!(bench.load().examples.len(), 1);
        assert_eq!(bench.entries().len(), 4);
    }

    #[test]
    fn an_entry_that_is_damaged_or_foreign_is_made_anew() {
        let mut bench = Bench::new();
        let whole = bench.load();
        let path = bench.entries().remove(0);
        let bytes = std::fs::read(&path).expect("readable");
        let name = path
            .file_stem()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let flipped = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            bytes
        };
        let cut = bytes[..bytes.len() - 1].to_vec();
        bench.options.max_length = Some(3);
        bench.load();
        let mut entries = bench.entries();
        entries.retain(|entry| *entry != path);
        let foreign = std::fs::read(&entries[0]).expect("readable");
        bench.options = PrepareOptions::default();
        let table = [
            (flipped(100), "damaged"),
            (flipped(bytes.len() - 40), "damaged"),
            (flipped(0), "no file of prepared rows"),
            (cut, "damaged"),
            (b"FERRTOK2".to_vec(), "no file of prepared rows"),
            (Vec::new(), "no file of prepared rows"),
            (foreign, "other rows"),
        ];
        for (bad, reason) in table {
            std::fs::write(&path, bad).expect("writable");
            let said = open(&path, &name).expect_err("it is bad");
            assert!(said.contains(reason), "{said}");
            let again = bench.load();
            assert_eq!(again.report, whole.report);
            assert!(std::fs::read(&path).expect("readable") == bytes, "{reason}");
        }
        std::fs::remove_file(&path).expect("writable");
        std::fs::create_dir(&path).expect("writable");
        assert_eq!(bench.load().report, whole.report);
        assert!(std::fs::read(&path).expect("a file again") == bytes);
    }

    #[test]
    fn a_directory_with_something_in_it_is_not_removed_for_an_entry() {
        let bench = Bench::new();
        bench.load();
        let path = bench.entries().remove(0);
        std::fs::remove_file(&path).expect("writable");
        std::fs::create_dir(&path).expect("writable");
        std::fs::write(path.join("mine"), "kept").expect("writable");
        let (files, cache) = (bench.files(), bench.cache());
        let error = Dataset::load_cached(&files, &bench.tokenizer, &bench.options, &cache);
        let message = error.expect_err("there is no place for it").to_string();
        assert!(message.contains(".examples"), "{message}");
        assert!(path.join("mine").exists());
    }

    #[test]
    fn rows_that_are_refused_leave_nothing_behind() {
        let bench = Bench::new();
        std::fs::write(&bench.files()[0], "{\"text\": 1}\n").expect("writable");
        let (files, cache) = (bench.files(), bench.cache());
        let error = Dataset::load_cached(&files, &bench.tokenizer, &bench.options, &cache);
        let message = error.expect_err("the row is bad").to_string();
        assert!(
            message.contains("rows.jsonl:1: `text` must be"),
            "{message}"
        );
        assert_eq!(bench.entries().len(), 0);
    }

    #[test]
    fn choosing_and_cutting_moves_no_token() {
        let bench = Bench::new();
        let (held, filed) = (
            Dataset::load(&bench.files(), &bench.tokenizer, &bench.options).expect("fine"),
            bench.load(),
        );
        let of = |examples: &Examples| -> Vec<Vec<crate::data::Example>> {
            let some = examples.select([7, 3, 3]);
            let split = examples.split_long(3).expect("readable");
            let wrapped = examples.wrap(100).expect("readable");
            assert_eq!(wrapped.tokens_in_memory(), examples.tokens_in_memory());
            let shuffled = some.wrap(4).expect("readable");
            [some, split, wrapped, shuffled]
                .map(|examples| {
                    let vec = examples.to_vec().expect("readable");
                    let trained: Vec<usize> = vec
                        .iter()
                        .map(crate::data::Example::trained_tokens)
                        .collect();
                    assert!(examples.trained_tokens().eq(trained));
                    vec
                })
                .to_vec()
        };
        assert_eq!(of(&held.examples), of(&filed.examples));
    }
}
