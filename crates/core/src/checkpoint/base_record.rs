//! Which weights an adapter was trained on, in a file beside it.

use crate::io::{ModelFiles, write_file};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Name of the record in an adapter's directory.
pub const BASE_RECORD: &str = "base_weights.json";

/// Longest record read. Ours have a hundred bytes.
const MAX_BYTES: u64 = 64 << 10;

/// Digits of a digest that a person compares.
const SHOWN: usize = 12;

/// The weights of a base: what they are, and what they are held in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRecord {
    /// [`ModelFiles::weights_digest`].
    pub blake3: String,
    /// [`ModelFiles::weights_format`].
    pub format: String,
}

/// What two records say of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Likeness {
    /// The same weights.
    Same,
    /// Held in other formats, so that their bytes tell nothing: an adapter that was trained on codes may well be
    /// merged into the values they were made of.
    OtherFormat,
    /// Other weights.
    Other,
}

impl BaseRecord {
    /// Of the weights in `files`.
    ///
    /// # Errors
    /// As [`ModelFiles::weights_digest`].
    pub fn of(files: &ModelFiles) -> Result<Self> {
        Ok(Self {
            blake3: files.weights_digest()?,
            format: files.weights_format(),
        })
    }

    /// What the adapter in `directory` says of its base; `None` where it says nothing, as PEFT's do.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the file is no such record; [`Error::Read`].
    pub fn read(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(BASE_RECORD);
        let file = match std::fs::File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.map_err(Error::read(&path))?,
        };
        let mut text = Vec::new();
        let read = file.take(MAX_BYTES).read_to_end(&mut text);
        read.map_err(Error::read(&path))?;
        let record = serde_json::from_slice(&text).map_err(|e| {
            let message = format!(
                "is no record of a base's weights ({e}); without the file nothing is compared"
            );
            Error::adapter(&path, message)
        })?;
        Ok(Some(record))
    }

    /// Writes `record` beside the adapter in `directory`; without one, takes away what an earlier adapter left there.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write(record: Option<&Self>, directory: &Path) -> Result<()> {
        let path = directory.join(BASE_RECORD);
        match record {
            Some(Self { blake3, format }) => {
                let document = serde_json::json!({ "blake3": blake3, "format": format });
                write_file(&path, format!("{document:#}\n").as_bytes())
            }
            None => match std::fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::write(&path)(e)),
                _ => Ok(()),
            },
        }
    }

    /// How it is to another.
    #[must_use]
    pub fn likeness(&self, other: &Self) -> Likeness {
        match (self.blake3 == other.blake3, self.format == other.format) {
            (true, _) => Likeness::Same,
            (false, true) => Likeness::Other,
            (false, false) => Likeness::OtherFormat,
        }
    }
}

/// Format and the start of the digest.
impl std::fmt::Display for BaseRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = self.blake3.get(..SHOWN).unwrap_or(&self.blake3);
        write!(f, "{} weights {shown}", self.format)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_a_damaged_one_is_an_error() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let at = directory.path();
        assert_eq!(BaseRecord::read(at).expect("nothing there"), None);
        let record = BaseRecord {
            blake3: "0123456789abcdef".into(),
            format: "BF16".into(),
        };
        BaseRecord::write(Some(&record), at).expect("writable");
        assert_eq!(BaseRecord::read(at).expect("whole"), Some(record.clone()));
        assert_eq!(record.to_string(), "BF16 weights 0123456789ab");
        std::fs::write(at.join(BASE_RECORD), "{}").expect("writable");
        let error = BaseRecord::read(at).expect_err("no digest").to_string();
        assert!(error.contains(BASE_RECORD), "{error}");
        BaseRecord::write(None, at).expect("removable");
        BaseRecord::write(None, at).expect("gone already");
        assert_eq!(BaseRecord::read(at).expect("nothing there"), None);
    }
}
