//! A data set: every example of the files, in their order.

use crate::data::classes;
use crate::data::columns::Columns;
use crate::data::examples::{Collector, Examples};
use crate::data::prepare::{BadRows, PrepareOptions, PrepareReport, Prepared, Preparer, Row};
use crate::data::prepared_file;
use crate::data::record::{COMPLETION_MASK, Record, RecordKind, rename_columns};
use crate::data::source::{self, RawRow};
use crate::data::tokenizer::Tokenizer;
use crate::io::write_file_with;
use crate::{Error, Result};
use rayon::prelude::*;
use serde_json::{Map, Value};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows and bytes that are prepared at a time: what memory holds beside the examples.
const CHUNK_ROWS: usize = 1024;
const CHUNK_BYTES: usize = 16 << 20;

/// Prepared examples and what happened to the rows they come from.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// The examples, in the order of the rows.
    pub examples: Examples,
    /// What preparation did.
    pub report: PrepareReport,
    /// The kind of its rows.
    pub kind: Option<RecordKind>,
    /// Where in `examples` those of each file end.
    pub file_ends: Vec<usize>,
}

impl Dataset {
    /// Reads and prepares files of rows. The first row decides what kind all rows are.
    ///
    /// # Errors
    /// [`Error::Data`] with file and line for a row that is broken or of another kind, and when
    /// no token of any row is trained; [`Error::Read`] for a file that cannot be read; and what
    /// [`Preparer::new`] and [`Preparer::prepare`] find.
    pub fn load(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        options: &PrepareOptions,
    ) -> Result<Self> {
        let mut builder = Builder::new(tokenizer, options, Collector::in_memory());
        builder.read_all(files)?;
        Ok(builder.held())
    }

    /// [`Dataset::load`] with the examples in a file of `directory`, which is made if the same files
    /// were not prepared before in the same way; a damaged one is made anew. Memory holds 16 bytes an
    /// example, and no token.
    ///
    /// # Errors
    /// As [`Dataset::load`], and [`Error::Write`] if the directory cannot be written.
    pub fn load_cached(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        options: &PrepareOptions,
        directory: &Path,
    ) -> Result<Self> {
        std::fs::create_dir_all(directory).map_err(Error::write(directory))?;
        let key = prepared_file::key(files, tokenizer, options)?;
        let path = directory.join(format!("{key}.examples"));
        match prepared_file::open(&path, &key) {
            Ok(Some(dataset)) => {
                tracing::info!("rows were prepared before: {}", path.display());
                return Ok(dataset);
            }
            Ok(None) => {}
            Err(reason) => {
                tracing::warn!("{}: {reason}; it is made anew", path.display());
                // A file cannot take the place of a directory. One with something in it is not touched.
                if path.is_dir() {
                    std::fs::remove_dir(&path).map_err(Error::write(&path))?;
                }
            }
        }
        let mut refused = None;
        let written = write_file_with(&path, |file| {
            let prepared = prepared_file::write(file, &key, |to| {
                let mut builder = Builder::new(tokenizer, options, Collector::to(to));
                builder.read_all(files)?;
                Ok((builder.dataset, builder.collector.into_sizes()))
            })?;
            prepared.map_err(|error| {
                refused = Some(error);
                io::Error::other("the rows cannot be prepared")
            })
        });
        if let Some(error) = refused {
            return Err(error);
        }
        written?;
        match prepared_file::open(&path, &key) {
            Ok(Some(dataset)) => Ok(dataset),
            gone => Err(prepared_file::unreadable(&path, gone.err())),
        }
    }

    /// Prepares rows that do not come from a file.
    ///
    /// # Errors
    /// As [`Dataset::load`].
    pub fn from_rows(
        rows: Vec<Row>,
        tokenizer: &Tokenizer,
        options: &PrepareOptions,
    ) -> Result<Self> {
        let origin = rows
            .first()
            .map_or_else(|| Arc::from(Path::new("(no rows)")), |r| r.path.clone());
        let mut builder = Builder::new(tokenizer, options, Collector::in_memory());
        builder.add(rows.into_par_iter().map(Ok).collect())?;
        builder.check_any(&origin)?;
        Ok(builder.held())
    }

    /// Replaces the examples by others made of them, and measures those.
    pub fn replace(&mut self, examples: Examples) {
        self.examples = examples;
        self.report.measure(&self.examples);
    }

    /// The number of tokens of each example.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        self.examples.lengths().collect()
    }
}

/// A data set being read.
struct Builder<'a, 'f> {
    tokenizer: &'a Tokenizer,
    options: &'a PrepareOptions,
    preparer: Option<Preparer<'a>>,
    dataset: Dataset,
    collector: Collector<'f>,
    columns: Columns,
}

impl<'a, 'f> Builder<'a, 'f> {
    fn new(
        tokenizer: &'a Tokenizer,
        options: &'a PrepareOptions,
        collector: Collector<'f>,
    ) -> Self {
        Self {
            tokenizer,
            options,
            preparer: None,
            dataset: Dataset::default(),
            collector,
            columns: Columns::new(options.dataset_columns.keys()),
        }
    }

    fn read_all(&mut self, files: &[PathBuf]) -> Result<()> {
        for file in files {
            self.read(file)?;
            self.dataset.file_ends.push(self.collector.len());
            let unused = self.columns.take_unused();
            if !unused.is_empty() {
                let of_files = &mut self.dataset.report.unused_columns;
                of_files.insert(file.clone(), unused);
            }
        }
        self.dataset.report.missing_columns = self.columns.missing();
        let first = files.first().map(PathBuf::as_path);
        self.check_any(first.unwrap_or(Path::new("(no file)")))
    }

    /// The data set, of examples that were held.
    fn held(self) -> Dataset {
        let mut dataset = self.dataset;
        dataset.examples = self.collector.held();
        dataset
    }

    fn read(&mut self, file: &Path) -> Result<()> {
        let path: Arc<Path> = Arc::from(file);
        let mut source = source::open(file)?;
        loop {
            let chunk = next_chunk(&mut source);
            if chunk.is_empty() {
                return Ok(());
            }
            let (options, columns) = (self.options, &self.columns);
            let read = |row: Result<RawRow>| {
                let documents = row.and_then(|row| Row::read(&path, row, options, columns));
                match documents {
                    Ok(rows) => rows.into_iter().map(Ok).collect(),
                    Err(error) => vec![Err(error)],
                }
            };
            self.add(chunk.into_par_iter().flat_map_iter(read).collect())?;
        }
    }

    /// Prepares rows in parallel and appends them in order; the first error in order wins, unless bad
    /// rows are skipped.
    fn add(&mut self, rows: Vec<Result<Row>>) -> Result<()> {
        if self.preparer.is_none() {
            let first = match self.options.bad_rows {
                BadRows::Error => rows.first().and_then(|row| row.as_ref().ok()),
                BadRows::Skip => rows.iter().find_map(|row| row.as_ref().ok()),
            };
            if let Some(row) = first {
                let kind = row.record.kind();
                self.preparer = Some(Preparer::new(self.tokenizer, self.options, kind)?);
                self.dataset.kind = Some(kind);
            }
        }
        let preparer = self.preparer.as_ref();
        let skips = self.options.bad_rows == BadRows::Skip;
        // Behind the first error nothing is looked at any more: a template that fails on every row may
        // take long to do so.
        let first_error = AtomicUsize::new(usize::MAX);
        let prepare = |(i, row): (usize, Result<Row>)| {
            if i > first_error.load(Ordering::Relaxed) {
                return None;
            }
            let prepared = prepare(preparer, row);
            if prepared.is_err() && !skips {
                first_error.fetch_min(i, Ordering::Relaxed);
            }
            Some(prepared)
        };
        let prepared: Vec<_> = rows.into_par_iter().enumerate().map(prepare).collect();
        let report = &mut self.dataset.report;
        for item in prepared.into_iter().flatten() {
            match item {
                Ok((row, prepared)) => {
                    if report.count(&row, &prepared, self.options.keep_unlabelled) {
                        let pushed = self.collector.push(&prepared.example, prepared.trained());
                        pushed.map_err(Error::write("the file of prepared rows"))?;
                    }
                }
                Err(error @ (Error::Data { .. } | Error::Template { .. })) if skips => {
                    report.count_bad(&error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Fails if there is nothing to train on.
    fn check_any(&self, origin: &Path) -> Result<()> {
        let report = &self.dataset.report;
        if report.rows == 0 {
            return Err(Error::data(
                origin,
                None,
                "no rows; expected one JSON object per line, or a parquet file with rows",
            ));
        }
        if report.trained_tokens == 0 {
            let hint = if let Some(first) = report.bad_row_messages.first() {
                &format!("; {} cannot be used, the first: {first}", report.bad_rows)
            } else if report.truncated_rows > 0 {
                "; truncation cut the trained part off: raise `max_length`"
            } else {
                ""
            };
            return Err(Error::data(
                origin,
                None,
                format!(
                    "no token of any of the {} rows is trained{hint}",
                    report.rows
                ),
            ));
        }
        Ok(())
    }
}

fn prepare(preparer: Option<&Preparer<'_>>, row: Result<Row>) -> Result<(Row, Prepared)> {
    let row = row?;
    let preparer = preparer
        .ok_or_else(|| Error::data(&row.path, row.line, "an earlier row could not be read"))?;
    let mut example = preparer.prepare(&row)?;
    let lost = preparer.truncate(&mut example);
    let classified = preparer.classifies();
    let prepared = Prepared {
        example,
        lost,
        classified,
    };
    Ok((row, prepared))
}

/// The next rows, bounded in number and bytes, the bad ones too.
fn next_chunk(source: &mut impl Iterator<Item = Result<RawRow>>) -> Vec<Result<RawRow>> {
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    while chunk.len() < CHUNK_ROWS && bytes < CHUNK_BYTES {
        let Some(row) = source.next() else { break };
        bytes += row.as_ref().map_or(0, RawRow::bytes);
        chunk.push(row);
    }
    chunk
}

impl Row {
    /// Reads a row of a file.
    fn read(
        path: &Arc<Path>,
        row: RawRow,
        options: &PrepareOptions,
        columns: &Columns,
    ) -> Result<Vec<Self>> {
        let number = row.number();
        let row = row.columns(path)?;
        columns.see(&row);
        let mut row = rename_columns(row, &options.dataset_columns)
            .map_err(|message| Error::data(path, number, message))?;
        if Record::leaves_mask_out(&mut row, options.completion_only_loss) {
            columns.see_left_out(COMPLETION_MASK);
        }
        let class = options.classes.as_ref().and_then(|_| classes::column(&row));
        let class = class.and_then(|name| row.remove_entry(name));
        columns.see_unused(&row, &options.dataset_text_field);
        let mut rows = Self::of_columns(path, number, &row, &options.dataset_text_field)?;
        if let Some((_, class)) = class {
            for row in &mut rows {
                row.label = Some(class.clone());
            }
        }
        Ok(rows)
    }

    /// Reads the columns of a row, which is at `line` of `path`, as a row for each document that is packed into
    /// it; see [`Record::documents_of_row`].
    ///
    /// # Errors
    /// [`Error::Data`] with file and line.
    pub fn of_columns(
        path: &Arc<Path>,
        line: u64,
        columns: &Map<String, Value>,
        text_field: &str,
    ) -> Result<Vec<Self>> {
        let documents = Record::documents_of_row(columns, text_field)
            .map_err(|message| Error::data(path, line, message))?;
        let label = classes::column(columns).and_then(|name| columns.get(name));
        let row = |record| Self {
            record,
            path: path.clone(),
            line,
            label: label.cloned(),
        };
        Ok(documents.into_iter().map(row).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixtures::repository;

    fn load(contents: &[&[u8]], options: &PrepareOptions) -> Result<Dataset, String> {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let files: Vec<PathBuf> = contents
            .iter()
            .enumerate()
            .map(|(i, bytes)| {
                let path = directory.path().join(format!("{i}.jsonl"));
                std::fs::write(&path, bytes).expect("the file is writable");
                path
            })
            .collect();
        let tokenizer = Tokenizer::from_dir(&repository().join("tokenizers/bpe_llama3"))
            .expect("the tokenizer loads");
        Dataset::load(&files, &tokenizer, options).map_err(|e| e.to_string())
    }

    #[test]
    fn rows_keep_their_order_over_chunks_files_and_threads() {
        let text = |i: usize| format!("{{\"text\": \"{i}\"}}\n");
        let first: String = (0..3000).map(text).collect();
        let second: String = (3000..3010).map(text).collect();
        let dataset = load(
            &[first.as_bytes(), second.as_bytes()],
            &PrepareOptions::default(),
        )
        .expect("the rows are valid");
        let tokenizer = Tokenizer::from_dir(&repository().join("tokenizers/bpe_llama3"))
            .expect("the tokenizer loads");
        assert_eq!(dataset.examples.len(), 3010);
        let examples = dataset.examples.to_vec().expect("memory is readable");
        for (i, example) in examples.iter().enumerate() {
            let decoded = tokenizer
                .decode(&example.input_ids, crate::data::Decoding::SkipSpecialTokens)
                .expect("the ids are valid");
            assert_eq!(decoded, i.to_string());
        }
    }

    #[test]
    fn truncation_and_dropped_rows_are_reported() {
        let options = PrepareOptions {
            max_length: Some(6),
            ..PrepareOptions::default()
        };
        let rows = b"{\"prompt\": \"hello\", \"completion\": \" world\"}\n\n\
                     {\"prompt\": \"hello hello hello\", \"completion\": \"x\"}\n";
        let dataset = load(&[rows], &options).expect("one row remains");
        let report = &dataset.report;
        assert_eq!(dataset.examples.len(), 1);
        assert_eq!(
            (report.rows, report.dropped_rows, report.truncated_rows),
            (2, 1, 2)
        );
        assert_eq!(report.dropped_lines[0].1, 3);
        assert_eq!(
            (report.tokens, report.trained_tokens, report.longest),
            (6, 2, 6)
        );
        assert_eq!(report.length_histogram, [(8, 1)].into_iter().collect());
        assert!(report.tokens_lost > 3);
    }

    #[test]
    fn hostile_files_are_refused_with_file_line_and_reason() {
        let text = "{\"text\": \"a\"}\n";
        let late = text.repeat(2000) + "{\"text\": 1}\n";
        let turned = text.repeat(2) + "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
        let table: [(&[u8], &str); 8] = [
            (b"", "0.jsonl: no rows"),
            (b"\n\n", "0.jsonl: no rows"),
            (
                b"{\"txt\": \"a\"}",
                "0.jsonl:1: no columns to train on: found `txt`",
            ),
            (
                b"{\"text\": \"a\"}\n{\"text\": \"\xc3\"}\n",
                "0.jsonl:2: byte 10 of the line",
            ),
            (
                b"{\"text\": \"a\"}\n{broken\n{broken\n",
                "0.jsonl:2: not valid JSON",
            ),
            (late.as_bytes(), "0.jsonl:2001: `text` must be a string"),
            (
                turned.as_bytes(),
                "0.jsonl:3: this row is `prompt` and `completion` as text, but the first row of \
                 the data set is text",
            ),
            (b"[{\"text\": \"a\"}]", "one object per line"),
        ];
        for (bytes, expected) in table {
            let message = load(&[bytes], &PrepareOptions::default()).expect_err("refused");
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
        let options = PrepareOptions {
            max_length: Some(2),
            ..PrepareOptions::default()
        };
        let rows = b"{\"prompt\": \"hello\", \"completion\": \"b\"}";
        let message = load(&[rows], &options).expect_err("nothing is left to train");
        assert!(message.contains("raise `max_length`"), "{message}");
    }

    #[test]
    fn a_missing_file_is_a_read_error() {
        let tokenizer = Tokenizer::from_dir(&repository().join("tokenizers/bpe_llama3"))
            .expect("the tokenizer loads");
        let error = Dataset::load(
            &[PathBuf::from("/nonexistent/rows.jsonl")],
            &tokenizer,
            &PrepareOptions::default(),
        )
        .expect_err("there is no such file");
        assert!(matches!(error, Error::Read { .. }), "{error}");
    }
}
