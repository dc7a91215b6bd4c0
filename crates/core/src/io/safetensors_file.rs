//! Reading one safetensors file.

use super::FileDType;
use super::convert::{is_float, read_rows};
use super::json::{UniqueMap, insert_unique};
use super::position::read_exact_at;
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use ferrotune_kernels::ViewMut;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes of the length that a file starts with.
pub(super) const LENGTH_BYTES: usize = 8;

/// Longest header accepted: room for 100,000 tensors, 700 times that of an 8B model. The format
/// itself allows 100 MB, which takes gigabytes once parsed.
pub(super) const MAX_HEADER_BYTES: u64 = 16 << 20;

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
struct Entry {
    meta: TensorMeta,
    offset: u64,
    bytes: usize,
}

/// An open safetensors file whose header is known to be sound.
///
/// Only the header is held in memory. Data is read with positioned reads, so one file can be read by
/// many threads, and a file that shrinks meanwhile is an error rather than a crash.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Opens `path` and checks its header: length, JSON, unique names, known dtypes, sizes that
    /// follow from the shapes, data without overlap or hole that ends where the file ends.
    ///
    /// # Errors
    /// [`Error::Read`] if the file cannot be read, [`Error::Model`] if it is not sound.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // Asked before opening, because opening a pipe would wait for its writer.
        let about = std::fs::metadata(path).map_err(Error::read(path))?;
        if !about.is_file() {
            return Err(Error::model(path, "is not a regular file"));
        }
        let file = File::open(path).map_err(Error::read(path))?;
        let file_bytes = file.metadata().map_err(Error::read(path))?.len();
        let header = read_header(&file, file_bytes).map_err(|e| e.into_error(path))?;
        let (entries, metadata) =
            check_header(&header, file_bytes).map_err(|defect| Error::model(path, defect))?;
        Ok(Self {
            path: path.into(),
            file,
            entries,
            metadata,
        })
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Dtype and shape of a tensor.
    #[must_use]
    pub fn meta(&self, name: &str) -> Option<&TensorMeta> {
        self.entries.get(name).map(|e| &e.meta)
    }

    /// The free-form part of the header.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All elements of an F32, F16 or BF16 tensor, in order, widened to f32.
    ///
    /// # Errors
    /// [`Error::Model`] if there is no such tensor, it holds another dtype, or the file shrank.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.float_entry(name)?;
        let mut values = vec![0.0; entry.meta.len()];
        let dst = ViewMut::from_f32(&mut values, 1, entry.meta.len());
        read_rows(&self.file, entry.offset, entry.meta.dtype, dst)
            .map_err(|e| self.read_error(name, e))?;
        Ok(values)
    }

    /// All elements of an I64 tensor, in order.
    ///
    /// # Errors
    /// [`Error::Model`] if there is no such tensor, it holds another dtype, or the file shrank.
    pub fn read_i64(&self, name: &str) -> Result<Vec<i64>> {
        let entry = self.entry(name)?;
        if entry.meta.dtype != FileDType::I64 {
            return Err(self.wrong_dtype(name, entry, "I64"));
        }
        let mut values = vec![0_i64; entry.meta.len()];
        read_exact_at(
            &self.file,
            bytemuck::cast_slice_mut(&mut values),
            entry.offset,
        )
        .map_err(|e| self.read_error(name, e))?;
        Ok(values)
    }

    /// The bytes of a tensor of any dtype, little-endian.
    ///
    /// # Errors
    /// [`Error::Model`] if there is no such tensor or the file shrank.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        let mut bytes = vec![0; entry.bytes];
        read_exact_at(&self.file, &mut bytes, entry.offset)
            .map_err(|e| self.read_error(name, e))?;
        Ok(bytes)
    }

    /// Reads an F32, F16 or BF16 tensor straight into `dst`, converting to its dtype.
    ///
    /// `dst` is `[rows, cols]`, `cols` being the last dimension of the tensor and `rows` the product
    /// of the others; a vector is one row. Rounding to bf16 is to nearest even. Large tensors are
    /// read by several threads, in pieces of about 1 MiB; there is no temporary of their size.
    ///
    /// # Errors
    /// [`Error::Model`] if there is no such tensor, its shape or dtype is another, or the file
    /// shrank.
    pub fn read_rows_into(&self, name: &str, dst: ViewMut<'_>) -> Result<()> {
        let entry = self.float_entry(name)?;
        if entry.meta.matrix_shape() != dst.shape() {
            return Err(self.defect(format!(
                "tensor `{name}` has shape {:?}, expected {:?} [rows, columns]; do the weights \
                 belong to this config.json?",
                entry.meta.shape,
                dst.shape()
            )));
        }
        read_rows(&self.file, entry.offset, entry.meta.dtype, dst)
            .map_err(|e| self.read_error(name, e))
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| {
            self.defect(format!(
                "no tensor `{name}` among {}{}",
                self.entries.len(),
                did_you_mean(name, self.names())
            ))
        })
    }

    fn float_entry(&self, name: &str) -> Result<&Entry> {
        let entry = self.entry(name)?;
        if is_float(entry.meta.dtype) {
            Ok(entry)
        } else {
            Err(self.wrong_dtype(name, entry, "F32, F16 or BF16"))
        }
    }

    fn wrong_dtype(&self, name: &str, entry: &Entry, expected: &str) -> Error {
        self.defect(format!(
            "tensor `{name}` is {}, expected {expected}",
            entry.meta.dtype
        ))
    }

    fn read_error(&self, name: &str, error: io::Error) -> Error {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return self.defect(format!(
                "ends inside tensor `{name}`: the file was cut short while it was being read"
            ));
        }
        Error::read(&self.path)(error)
    }

    fn defect(&self, message: impl Into<String>) -> Error {
        Error::model(&self.path, message)
    }
}

/// Why a header could not be had.
enum HeaderError {
    Defect(String),
    Io(io::Error),
}

impl HeaderError {
    fn into_error(self, path: &Path) -> Error {
        match self {
            Self::Defect(message) => Error::model(path, message),
            Self::Io(error) => Error::read(path)(error),
        }
    }
}

/// The JSON bytes of the header, at most [`MAX_HEADER_BYTES`] and never more than the file holds.
fn read_header(file: &File, file_bytes: u64) -> Result<Vec<u8>, HeaderError> {
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

type Contents = (BTreeMap<String, Entry>, BTreeMap<String, String>);

fn check_header(header: &[u8], file_bytes: u64) -> Result<Contents, String> {
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
                        insert_unique(&mut header.tensors, key, access.next_value()?)?;
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
