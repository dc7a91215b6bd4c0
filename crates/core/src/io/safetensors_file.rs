//! Reading one safetensors file.

use super::FileDType;
use super::convert::{is_float, read_rows};
use super::position::read_exact_at;
use super::safetensors_header::{Entry, TensorMeta, check_header, read_header};
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use ferrotune_kernels::{Tensor, ViewMut};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Host memory through which a weight goes to a GPU.
const STAGED_BYTES: usize = 64 << 20;

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

    /// The tensors `entries` of a file of another format, which lie inside of it.
    pub(super) fn of_parts(path: &Path, file: File, entries: BTreeMap<String, Entry>) -> Self {
        Self {
            path: path.into(),
            file,
            entries,
            metadata: BTreeMap::new(),
        }
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

    /// Bytes of a tensor.
    pub(super) fn bytes_of(&self, name: &str) -> Option<usize> {
        self.entries.get(name).map(|e| e.bytes)
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
        self.read_bytes_at(name, 0, self.entry(name)?.bytes)
    }

    /// `length` bytes of a tensor from its byte `start` on, which it has.
    pub(super) fn read_bytes_at(&self, name: &str, start: usize, length: usize) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        let mut bytes = vec![0; length];
        read_exact_at(&self.file, &mut bytes, entry.offset + start as u64)
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
        let row_bytes = entry.bytes / dst.rows().max(1);
        let read = |first: usize, dst: ViewMut<'_>| {
            let offset = entry.offset + (first * row_bytes) as u64;
            read_rows(&self.file, offset, entry.meta.dtype, dst)
                .map_err(|e| self.read_error(name, e))
        };
        if dst.device().is_none() {
            return read(0, dst);
        }
        staged(dst, read)
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

/// Fills `dst`, which a GPU holds, through host memory, [`STAGED_BYTES`] at a time.
fn staged(
    mut dst: ViewMut<'_>,
    mut read: impl FnMut(usize, ViewMut<'_>) -> Result<()>,
) -> Result<()> {
    let ([rows, cols], dtype) = (dst.shape(), dst.dtype());
    let at_once = (STAGED_BYTES / (cols * dtype.bytes()).max(1)).clamp(1, rows.max(1));
    let mut stage = Tensor::zeros(dtype, at_once, cols);
    for first in (0..rows).step_by(at_once) {
        let end = rows.min(first + at_once);
        let mut part = stage.view_mut().row_range(0..end - first);
        read(first, part.reborrow())?;
        dst.reborrow()
            .row_range(first..end)
            .copy_from(part.as_view());
    }
    Ok(())
}
