//! Rows of parquet files, as the JSON objects that a JSON Lines file would hold.

use crate::data::compressed::{ALWAYS_ALLOWED, MAX_EXPANSION, most_bytes};
use crate::data::jsonl::MAX_LINE_BYTES;
use crate::guarded::guarded;
use crate::{Error, Result};
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::reader::RowIter;
use ::parquet::record::{Field, Row};
use serde_json::{Map, Value};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The rows of a file; pages are decoded as they are reached.
pub(super) struct ParquetRows {
    path: PathBuf,
    rows: RowIter<'static>,
    number: u64,
    failed: bool,
    /// Bytes of the file, and of its rows so far: a value of a dictionary is many times in the rows.
    length: u64,
    read: u64,
}

impl ParquetRows {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Read`] when it cannot be opened, [`Error::Data`] when it is not whole.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::read(path))?;
        let length = file.metadata().map_err(Error::read(path))?.len();
        let broken = |e: String| Error::data(path, None, format!("not a whole parquet file: {e}"));
        let reader = guarded(|| SerializedFileReader::new(file)).map_err(broken)?;
        let reader = reader.map_err(|e| broken(e.to_string()))?;
        let groups = reader.metadata().row_groups();
        for (group, metadata) in groups.iter().enumerate() {
            check_size(path, group, metadata)?;
            check_codecs(path, metadata)?;
        }
        let bytes = groups
            .iter()
            .map(|group| group.total_byte_size().max(0) as u64);
        check_expansion(path, length, bytes.sum())?;
        Ok(Self {
            path: path.to_path_buf(),
            rows: guarded(|| RowIter::from_file_into(Box::new(reader))).map_err(broken)?,
            number: 0,
            failed: false,
            length,
            read: 0,
        })
    }

    /// Bounds a row, as a line is, and all rows by the file, as those of a compressed file are.
    fn check_row(&mut self, row: &Map<String, Value>) -> Result<()> {
        let bytes = row.values().map(text_bytes).sum::<usize>();
        self.read += bytes as u64;
        let limit = most_bytes(self.length);
        if self.read > limit {
            self.failed = true;
            let message = format!(
                "the rows up to here are more than {limit} bytes, over {MAX_EXPANSION} times the file, which rows \
                 of data are not; write them as JSON Lines if it is what you mean"
            );
            let message = format!("row {}: {message}", self.number);
            return Err(Error::read(&self.path)(io::Error::other(message)));
        }
        if bytes > MAX_LINE_BYTES {
            let message = format!("the row has {bytes} bytes; at most {MAX_LINE_BYTES} are read");
            return Err(Error::data(&self.path, self.number, message));
        }
        Ok(())
    }
}

/// Bytes of what a value says, about.
pub(super) fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.values().map(text_bytes).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
    }
}

/// Refuses a compression that is not built in, before a row is read.
fn check_codecs(path: &Path, metadata: &::parquet::file::metadata::RowGroupMetaData) -> Result<()> {
    use ::parquet::basic::Compression::{self, GZIP, SNAPPY, UNCOMPRESSED, ZSTD};
    let is_known = |codec: &Compression| matches!(codec, UNCOMPRESSED | SNAPPY | GZIP(_) | ZSTD(_));
    let codecs = metadata.columns().iter();
    let mut codecs = codecs.map(::parquet::file::metadata::ColumnChunkMetaData::compression);
    let Some(other) = codecs.find(|codec| !is_known(codec)) else {
        return Ok(());
    };
    let name = format!("{other:?}").to_lowercase();
    let name = name.split('(').next().unwrap_or_default();
    let message = format!(
        "is compressed by {name}; snappy, gzip and zstd are read: write it with one of these, as pyarrow does with \
         compression='zstd'"
    );
    Err(Error::data(path, None, message))
}

/// Refuses a small file that says it is a large one, as a JSON Lines file that is compressed is.
fn check_expansion(path: &Path, length: u64, bytes: u64) -> Result<()> {
    if bytes <= ALWAYS_ALLOWED.max(length.saturating_mul(MAX_EXPANSION)) {
        return Ok(());
    }
    let message = format!(
        "says that its {length} bytes are {bytes}; at most {MAX_EXPANSION} times as many are read"
    );
    Err(Error::data(path, None, message))
}

/// What decompression may take is known before it begins.
fn check_size(
    path: &Path,
    group: usize,
    metadata: &::parquet::file::metadata::RowGroupMetaData,
) -> Result<()> {
    const LARGEST: i64 = 8 << 30;
    let bytes = metadata.total_byte_size();
    if (0..=LARGEST).contains(&bytes) {
        return Ok(());
    }
    let message =
        format!("row group {group} says it has {bytes} bytes; at most {LARGEST} are read");
    Err(Error::data(path, None, message))
}

impl Iterator for ParquetRows {
    type Item = Result<(u64, Map<String, Value>)>;

    /// The next row; nothing after a page that cannot be decoded, as the rows behind it cannot either.
    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        // The crate panics on some pages whose bytes are not what their headers say.
        let row = guarded(|| Some(self.rows.next()?.map(|row| object(&row))));
        let row = match row {
            Ok(row) => row?.map_err(|error| error.to_string()),
            Err(panic) => Err(panic),
        };
        self.number += 1;
        Some(match row {
            Ok(Value::Object(object)) => self.check_row(&object).map(|()| (self.number, object)),
            other => {
                self.failed = true;
                let reason = match other {
                    Err(reason) => reason,
                    Ok(other) => format!("expected columns, found {other}"),
                };
                let reason = format!("row {} cannot be decoded: {reason}", self.number);
                Err(Error::read(&self.path)(io::Error::other(reason)))
            }
        })
    }
}

/// A row as a line of a JSON Lines file.
fn object(row: &Row) -> Value {
    let columns = row.get_column_iter();
    Value::Object(
        columns
            .map(|(name, field)| (name.clone(), json(field)))
            .collect(),
    )
}

fn json(field: &Field) -> Value {
    match field {
        // Some writers leave it out that a column is text.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            // Of no kind that could be trained on by mistake.
            Err(_) => serde_json::json!({ "bytes": bytes.len() }),
        },
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter();
            let named = entries.map(|(key, value)| {
                let key = json(key);
                let name = key.as_str().map_or_else(|| key.to_string(), str::to_owned);
                (name, json(value))
            });
            Value::Object(named.collect())
        }
        other => other.to_json_value(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::record::Record;
    use serde_json::json;

    /// Files that pyarrow 26 wrote.
    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/parquet")
            .join(name)
    }

    fn records(name: &str) -> Vec<Record> {
        let rows = ParquetRows::open(&fixture(name)).expect("the file is whole");
        rows.zip(1..)
            .map(|(row, expected)| {
                let (number, columns) = row.expect("the row is whole");
                assert_eq!(number, expected);
                Record::from_row(&columns, "text").expect("the row has a known kind")
            })
            .collect()
    }

    #[test]
    fn rows_are_the_objects_that_json_lines_would_hold() {
        for name in ["messages_snappy.parquet", "messages_zstd.parquet"] {
            let expected: Vec<Record> = (0..7)
                .map(|i| {
                    let name = if i % 2 == 1 { json!("x") } else { json!(null) };
                    let row = json!({"messages": [
                        {"role": "user", "content": format!("question {i} \u{df}"), "name": null},
                        {"role": "assistant", "content": format!("answer {i}"), "name": name},
                    ], "prompt": null, "id": i});
                    let row = row.as_object().expect("an object");
                    Record::from_row(row, "text").expect("the row has a known kind")
                })
                .collect();
            assert_eq!(records(name), expected);
        }
        let tokens = |input_ids: [u32; 2], labels: [i32; 2]| Record::Tokens {
            input_ids: input_ids.to_vec(),
            labels: labels.to_vec(),
        };
        let found = records("tokens_gzip.parquet");
        assert_eq!(found[1], tokens([7, 10], [-100, 10]));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn bytes_are_text_where_they_can_be_and_nothing_to_train_on_elsewhere() {
        let of = |bytes: &[u8]| json(&Field::Bytes(bytes.to_vec().into()));
        assert_eq!(of("gr\u{fc}n".as_bytes()), json!("gr\u{fc}n"));
        let row = json!({"text": of(&[0xff, 0xfe])});
        let error = Record::from_row(row.as_object().expect("an object"), "text");
        let error = error.expect_err("no text").to_string();
        assert!(
            error.contains("`text` must be a string, found an object"),
            "{error}"
        );
    }

    #[test]
    fn a_small_file_that_is_large_inside_is_refused() {
        let path = Path::new("bomb.parquet");
        assert!(check_expansion(path, 1 << 10, 1 << 20).is_ok());
        assert!(check_expansion(path, 1 << 20, 100 << 20).is_ok());
        let error = check_expansion(path, 144 << 10, 1500 << 20).expect_err("refused");
        assert!(error.to_string().contains("200 times"), "{error}");
    }

    #[test]
    fn a_value_that_is_written_once_and_repeated_is_bounded_by_the_file() {
        // 400 rows of 1 MiB in 523 bytes.
        let mut rows = ParquetRows::open(&fixture("repeated.parquet")).expect("the file is whole");
        let read = rows.by_ref().take_while(Result::is_ok).count();
        assert_eq!(read, 64);
        assert!(rows.next().is_none());
        let mut rows = ParquetRows::open(&fixture("repeated.parquet")).expect("the file is whole");
        let error = rows.find_map(Result::err).expect("it is refused");
        assert_eq!(error.exit_code() as i32, 65);
        let message = error.to_string();
        assert!(message.contains("row 65: the rows up to here"), "{message}");
    }

    #[test]
    fn compression_that_is_not_built_in_is_named() {
        for name in ["lz4", "brotli"] {
            let path = fixture(&format!("{name}.parquet"));
            let error = ParquetRows::open(&path).err().expect("it is refused");
            let message = error.to_string();
            assert!(
                message.contains(&format!("is compressed by {name}")),
                "{message}"
            );
        }
    }

    #[test]
    fn a_file_with_any_byte_changed_is_read_or_refused_by_name() {
        let whole = std::fs::read(fixture("messages_snappy.parquet")).expect("it is readable");
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let path = directory.path().join("changed.parquet");
        let (mut refused, mut panics) = (0, 0);
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            std::fs::write(&path, &bytes).expect("the file is writable");
            // What a panic hook would hear of is caught: the test itself would end otherwise.
            let error = match ParquetRows::open(&path) {
                Ok(rows) => rows.take(1000).find_map(Result::err),
                Err(error) => Some(error),
            };
            if let Some(error) = error {
                let message = error.to_string();
                assert!(message.contains("changed.parquet"), "byte {at}: {message}");
                assert_eq!(error.exit_code() as i32, 65, "byte {at}: {message}");
                refused += 1;
                panics += usize::from(message.contains("range") || message.contains("panicked"));
            }
        }
        assert!(
            refused > whole.len() / 2 && panics > 0,
            "{refused} refused, {panics} panics"
        );
    }

    #[test]
    fn a_file_that_is_cut_off_is_refused() {
        let whole = std::fs::read(fixture("messages_snappy.parquet")).expect("it is readable");
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let path = directory.path().join("cut.parquet");
        for end in [4, 100, whole.len() - 1] {
            std::fs::write(&path, &whole[..end]).expect("the file is writable");
            let error = ParquetRows::open(&path).err().expect("it is not whole");
            assert!(
                error.to_string().contains("not a whole parquet file"),
                "{error}"
            );
        }
    }
}
