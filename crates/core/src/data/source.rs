//! Files of rows, whatever their format.

use crate::data::jsonl::{JsonLines, Line, parse_object};
use crate::data::parquet::{ParquetRows, text_bytes};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The first bytes of a parquet file.
const PARQUET: [u8; 4] = *b"PAR1";

/// A row that is not looked into yet, so that threads can share that work.
pub(super) enum RawRow {
    Line(Line),
    Columns(u64, Map<String, Value>),
}

impl RawRow {
    /// Its line, or its number in a file without lines, from 1.
    pub(super) fn number(&self) -> u64 {
        match self {
            Self::Line(line) => line.number,
            Self::Columns(number, _) => *number,
        }
    }

    /// Bytes of its text, about.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Line(line) => line.text.len(),
            Self::Columns(_, columns) => columns.values().map(text_bytes).sum(),
        }
    }

    /// Its columns.
    ///
    /// # Errors
    /// As [`parse_object`].
    pub(super) fn columns(self, path: &Path) -> Result<Map<String, Value>> {
        match self {
            Self::Line(line) => parse_object(path, &line),
            Self::Columns(_, columns) => Ok(columns),
        }
    }
}

/// The rows of a file, each with its line, or its number in a file without lines, from 1: JSON Lines, plain or
/// as gzip or zstd, or parquet.
///
/// # Errors
/// [`Error::Read`] when it cannot be opened, [`Error::Data`] when it is a broken parquet file; and as items
/// [`Error::Data`] with the line of a row that is no JSON object.
pub fn read_columns(
    path: &Path,
) -> Result<impl Iterator<Item = Result<(u64, Map<String, Value>)>> + use<'_>> {
    let rows = open(path)?;
    Ok(rows.map(move |row| {
        let row = row?;
        Ok((row.number(), row.columns(path)?))
    }))
}

/// The rows of a file: JSON Lines, plain or as gzip or zstd, or parquet.
///
/// # Errors
/// [`Error::Read`] when it cannot be opened, [`Error::Data`] when it is a broken parquet file.
pub(super) fn open(path: &Path) -> Result<Box<dyn Iterator<Item = Result<RawRow>>>> {
    let mut start = Vec::new();
    let metadata = std::fs::metadata(path).map_err(Error::read(path))?;
    // What is read of a pipe is gone, and parquet is read from its end.
    if metadata.is_file() {
        let file = File::open(path).map_err(Error::read(path))?;
        file.take(PARQUET.len() as u64)
            .read_to_end(&mut start)
            .map_err(Error::read(path))?;
    }
    if start == PARQUET {
        let rows = ParquetRows::open(path)?;
        return Ok(Box::new(rows.map(|row| {
            row.map(|(number, columns)| RawRow::Columns(number, columns))
        })));
    }
    Ok(Box::new(
        JsonLines::open(path)?.map(|line| line.map(RawRow::Line)),
    ))
}
