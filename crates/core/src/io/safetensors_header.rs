//! The header of a safetensors file, checked before anything is believed.

use super::FileDType;
use super::json::{UniqueMap, insert_unique};
use super::position::read_exact_at;
use crate::Error;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

/// Bytes of the length that a file starts with.
pub(super) const LENGTH_BYTES: usize = 8;

/// Longest header accepted: room for 100,000 tensors, 700 times that of an 8B model. The format
/// itself allows 100 MB, which takes gigabytes once parsed.
pub(super) const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Most dimensions accepted. A shape of two-byte zeros would otherwise take four times its text.
const MAX_DIMENSIONS: usize = 32;

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMeta {
    /// Element type in the file.
    pub dtype: FileDType,
    /// Dimensions; the last one is contiguous.
    pub shape: Vec<usize>,
}

impl TensorMeta {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape as a matrix: all dimensions but the last are rows; a vector is one row.
    #[must_use]
    pub fn matrix_shape(&self) -> [usize; 2] {
        match self.shape.split_last() {
            Some((&cols, rows)) => [rows.iter().product(), cols],
            None => [1, 1],
        }
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) meta: TensorMeta,
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

/// Why a header could not be had.
pub(super) enum HeaderError {
    Defect(String),
    Io(io::Error),
}

impl HeaderError {
    pub(super) fn into_error(self, path: &Path) -> Error {
        match self {
            Self::Defect(message) => Error::model(path, message),
            Self::Io(error) => Error::read(path)(error),
        }
    }
}

/// The JSON bytes of the header, at most [`MAX_HEADER_BYTES`] and never more than the file holds.
pub(super) fn read_header(file: &File, file_bytes: u64) -> Result<Vec<u8>, HeaderError> {
    if file_bytes < LENGTH_BYTES as u64 {
        return Err(HeaderError::Defect(format!(
            "has {file_bytes} bytes, too short for a safetensors file; was the download cut off?"
        )));
    }
    let mut length = [0; LENGTH_BYTES];
    read_exact_at(file, &mut length, 0).map_err(HeaderError::Io)?;
    let length = u64::from_le_bytes(length);
    let rest = file_bytes - LENGTH_BYTES as u64;
    if length > rest {
        return Err(HeaderError::Defect(format!(
            "claims a header of {length} bytes, but only {rest} follow: not a safetensors file, or \
             cut short (a Git LFS pointer starts with `version`)"
        )));
    }
    if length > MAX_HEADER_BYTES {
        return Err(HeaderError::Defect(format!(
            "header of {length} bytes is longer than {MAX_HEADER_BYTES}; split the file into shards"
        )));
    }
    // At most MAX_HEADER_BYTES, so it fits a usize.
    let mut header = vec![0; length as usize];
    read_exact_at(file, &mut header, LENGTH_BYTES as u64).map_err(HeaderError::Io)?;
    Ok(header)
}

/// Tensors by name, and the free-form part.
pub(super) type Contents = (BTreeMap<String, Entry>, BTreeMap<String, String>);

/// Parses the JSON and checks it against the length of the file.
pub(super) fn check_header(header: &[u8], file_bytes: u64) -> Result<Contents, String> {
    if header.first() != Some(&b'{') {
        return Err("safetensors header does not start with `{`".into());
    }
    let parsed: Header = serde_json::from_slice(header)
        .map_err(|e| format!("safetensors header is not valid: {e}"))?;
    let mut by_offset: Vec<(String, TensorInfo)> = parsed.tensors.into_iter().collect();
    by_offset.sort_by_key(|(_, info)| info.data_offsets);
    let checked = Metadata::new(None, by_offset.clone())
        .map_err(|e| format!("safetensors header is not sound: {e}"))?;
    let data_start = (LENGTH_BYTES + header.len()) as u64;
    let expected = data_start.saturating_add(checked.data_len() as u64);
    if expected != file_bytes {
        let fate = if expected > file_bytes {
            "is cut short"
        } else {
            "has bytes after its data"
        };
        return Err(format!(
            "has {file_bytes} bytes, its header describes {expected}: the file {fate}; copy or \
             download it again"
        ));
    }
    let entries = by_offset
        .into_iter()
        .map(|(name, info)| {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                meta: TensorMeta {
                    dtype: info.dtype,
                    shape: info.shape,
                },
                offset: data_start + start as u64,
                bytes: end - start,
            };
            (name, entry)
        })
        .collect();
    Ok((entries, parsed.metadata))
}

/// The JSON of a header. Unlike the crate's own type it refuses repeated names.
#[derive(Debug, Default)]
struct Header {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut metadata = None;
                while let Some(key) = access.next_key::<String>()? {
                    if key != "__metadata__" {
                        let info: Info = access.next_value().map_err(|error| {
                            serde::de::Error::custom(format!("tensor `{key}`: {error}"))
                        })?;
                        insert_unique(&mut header.tensors, key, info.into())?;
                    } else if metadata.is_none() {
                        metadata = access.next_value::<Option<UniqueMap<String>>>().map(Some)?;
                    } else {
                        return Err(serde::de::Error::custom("`__metadata__` appears twice"));
                    }
                }
                header.metadata = metadata.flatten().map(|m| m.0).unwrap_or_default();
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A tensor in the JSON of a header, of at most [`MAX_DIMENSIONS`].
#[derive(Deserialize)]
struct Info {
    dtype: FileDType,
    shape: Shape,
    data_offsets: (usize, usize),
}

impl From<Info> for TensorInfo {
    fn from(info: Info) -> Self {
        Self {
            dtype: info.dtype,
            shape: info.shape.0,
            data_offsets: info.data_offsets,
        }
    }
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DIMENSIONS} dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = access.next_element()? {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(serde::de::Error::invalid_length(shape.len() + 1, &self));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}
