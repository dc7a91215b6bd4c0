//! JSON Lines, read one line at a time: memory is bounded by the longest line, not by the file.

use crate::data::compressed;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::io::BufRead;
use std::path::{Path, PathBuf};

/// The longest line that is read: 64 MiB.
pub const MAX_LINE_BYTES: usize = 64 << 20;

/// One line that is not blank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its number in the file, from 1.
    pub number: u64,
    /// Its text, without the line break.
    pub text: String,
}

/// The lines of a JSON Lines file. Blank lines are passed over but counted.
#[derive(Debug)]
pub struct JsonLines<R> {
    reader: R,
    path: PathBuf,
    number: u64,
    limit: usize,
    failed: bool,
}

impl JsonLines<Box<dyn BufRead + Send>> {
    /// Opens a file, which may be compressed by gzip or zstd.
    ///
    /// # Errors
    /// [`Error::Read`] when it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self::new(compressed::open(path)?, path))
    }
}

impl<R: BufRead> JsonLines<R> {
    /// Reads lines from `reader`; `path` is what errors call it.
    pub fn new(reader: R, path: &Path) -> Self {
        Self {
            reader,
            path: path.to_path_buf(),
            number: 0,
            limit: MAX_LINE_BYTES,
            failed: false,
        }
    }

    /// Sets the longest line that is read, in bytes.
    #[must_use]
    pub fn line_limit(mut self, bytes: usize) -> Self {
        self.limit = bytes;
        self
    }

    /// The next line's bytes without the line break, or nothing at the end of the file.
    fn next_bytes(&mut self) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let mut started = false;
        loop {
            let buffer = self.reader.fill_buf().map_err(Error::read(&self.path))?;
            if buffer.is_empty() {
                self.number += u64::from(started);
                return Ok(started.then_some(line));
            }
            started = true;
            let end = memchr::memchr(b'\n', buffer);
            let taken = end.unwrap_or(buffer.len());
            if line.len() + taken > self.limit {
                self.pass_over_line()?;
                return Err(self.error(
                    self.number,
                    format!(
                        "the line is longer than {} bytes; one JSON object per line is expected",
                        self.limit
                    ),
                ));
            }
            line.extend_from_slice(&buffer[..taken]);
            self.reader.consume(taken + usize::from(end.is_some()));
            if end.is_some() {
                self.number += 1;
                return Ok(Some(line));
            }
        }
    }

    /// Goes on behind the line that is being read.
    fn pass_over_line(&mut self) -> Result<()> {
        self.number += 1;
        loop {
            let buffer = self.reader.fill_buf().map_err(Error::read(&self.path))?;
            let end = memchr::memchr(b'\n', buffer);
            let taken = end.map_or(buffer.len(), |end| end + 1);
            if taken == 0 {
                return Ok(());
            }
            self.reader.consume(taken);
            if end.is_some() {
                return Ok(());
            }
        }
    }

    fn next_line(&mut self) -> Result<Option<Line>> {
        while let Some(mut bytes) = self.next_bytes()? {
            if self.number == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
                bytes.drain(..3);
            }
            let text = String::from_utf8(bytes).map_err(|e| {
                let at = e.utf8_error().valid_up_to();
                self.error(self.number, not_utf8(e.as_bytes(), at))
            })?;
            if !text.trim().is_empty() {
                return Ok(Some(Line {
                    number: self.number,
                    text,
                }));
            }
        }
        Ok(None)
    }

    fn error(&self, number: u64, message: String) -> Error {
        Error::data(&self.path, number, message)
    }
}

impl<R: BufRead> Iterator for JsonLines<R> {
    type Item = Result<Line>;

    /// The next line, or what is wrong with it; nothing after a file that cannot be read.
    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let line = self.next_line().transpose();
        self.failed = matches!(line, Some(Err(Error::Read { .. })));
        line
    }
}

/// What is wrong with bytes that are not UTF-8, and what the file may be instead.
fn not_utf8(bytes: &[u8], at: usize) -> String {
    let guess = match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "; this looks like UTF-16: save it as UTF-8",
        _ => "; save the file as UTF-8",
    };
    format!(
        "byte {at} of the line, 0x{:02x}, is not valid UTF-8{guess}",
        bytes.get(at).copied().unwrap_or_default()
    )
}

/// Parses a line as one JSON object.
///
/// # Errors
/// [`Error::Data`] with the line when it is not JSON, nested deeper than 128 levels, or not an
/// object.
pub fn parse_object(path: &Path, line: &Line) -> Result<Map<String, Value>> {
    let error = |message: String| Error::data(path, line.number, message);
    match serde_json::from_str(&line.text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(error(format!(
            "expected a JSON object such as {{\"text\": \"...\"}}, found {}{}",
            json_kind(&other),
            if other.is_array() {
                "; write one object per line instead of one array"
            } else {
                ""
            }
        ))),
        Err(e) => Err(error(format!(
            "not valid JSON at column {}: {}; each line must be one complete JSON object",
            e.column(),
            // The parser's own "at line 1 column 5" would contradict the line of the file.
            e.to_string().split(" at line ").next().unwrap_or_default()
        ))),
    }
}

/// What a JSON value is, in words, for messages.
#[must_use]
pub fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    fn lines(bytes: &[u8]) -> Vec<Result<Line>> {
        JsonLines::new(BufReader::with_capacity(4, bytes), Path::new("rows.jsonl"))
            .line_limit(64)
            .collect()
    }

    fn first_error(bytes: &[u8]) -> String {
        lines(bytes)
            .into_iter()
            .find_map(|line| match line {
                Err(e) => Some(e.to_string()),
                Ok(line) => parse_object(Path::new("rows.jsonl"), &line)
                    .err()
                    .map(|e| e.to_string()),
            })
            .expect("the input is hostile")
    }

    #[test]
    fn blank_lines_bom_and_carriage_returns_are_passed_over_and_counted() {
        let found: Vec<_> = lines(b"\xef\xbb\xbf{\"a\":1}\r\n\n  \n{\"b\":2}")
            .into_iter()
            .map(|l| l.expect("the lines are valid").number)
            .collect();
        assert_eq!(found, [1, 4]);
    }

    #[test]
    fn hostile_lines_are_refused_with_file_line_and_reason() {
        let deep = [b"{\"a\":".as_slice(), &[b'['; 50]].concat();
        let table: &[(&[u8], &str)] = &[
            (
                b"{}\n{\"a\": }\n",
                "rows.jsonl:2: not valid JSON at column 7",
            ),
            (b"{}\n\n{\"a\"\n", "rows.jsonl:3: not valid JSON"),
            (b"{}\n[1]\n", "rows.jsonl:2: expected a JSON object"),
            (b"{}\n\"x\"\n", "found a string"),
            (b"{\"a\": NaN}\n", "rows.jsonl:1: not valid JSON"),
            (
                b"{}\n{\"a\": \"\xff\"}\n",
                "rows.jsonl:2: byte 7 of the line, 0xff",
            ),
            (b"\xff\xfe\x00", "UTF-16"),
            (&deep, "rows.jsonl:1: not valid JSON"),
            (
                &[b'x'; 100],
                "rows.jsonl:1: the line is longer than 64 bytes",
            ),
        ];
        for (bytes, expected) in table {
            let message = first_error(bytes);
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
    }

    #[test]
    fn nesting_beyond_the_parser_limit_is_an_error_not_a_crash() {
        let line = Line {
            number: 7,
            text: "[".repeat(1_000_000),
        };
        let message = parse_object(Path::new("f"), &line)
            .expect_err("a million brackets are refused")
            .to_string();
        assert!(
            message.contains("f:7: ") && message.contains("recursion"),
            "{message}"
        );
    }

    #[test]
    fn lines_behind_a_bad_one_keep_their_numbers() {
        let long = [b"\xff\n{}\n".as_slice(), &[b'x'; 100], b"\n{\"a\":1}"].concat();
        let found: Vec<Option<u64>> = lines(&long)
            .into_iter()
            .map(|line| line.ok().map(|line| line.number))
            .collect();
        assert_eq!(found, [None, Some(2), None, Some(4)]);
    }
}
