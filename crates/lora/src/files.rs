//! The two files of an adapter, as PEFT writes and reads them.

use ferrotune_core::io::{self, FileDType, SafetensorsFile, TensorData};
use ferrotune_core::params::{FlatBuffer, ParamId, ParamSpec};
use ferrotune_core::{Error, Result, suggest};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Configuration of an adapter.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
/// Tensors of an adapter.
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Tensors of an adapter as a pickle, which is never read.
const PICKLE_FILE: &str = "adapter_model.bin";

/// Writes both files. The configuration comes last: with it the adapter is complete.
pub(crate) fn write(
    directory: &Path,
    tensors: &BTreeMap<String, TensorData<'_>>,
    config: &str,
) -> Result<()> {
    write_tensors(directory, tensors)?;
    io::write_file(&directory.join(CONFIG_FILE), config.as_bytes())
}

/// Writes the weights file, and the directory where there is none.
pub(crate) fn write_tensors(
    directory: &Path,
    tensors: &BTreeMap<String, TensorData<'_>>,
) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(Error::write(directory))?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    io::write_safetensors(&directory.join(WEIGHTS_FILE), tensors, &metadata)
}

/// The tensors of a file that hold one parameter, f32: under both its names where it has two.
pub(crate) fn of_parameter(
    params: &FlatBuffer,
    id: ParamId,
) -> impl Iterator<Item = (String, TensorData<'_>)> {
    let ParamSpec {
        name, also, shape, ..
    } = &params.layout().segment(id).spec;
    let data = TensorData {
        dtype: FileDType::F32,
        shape: params.layout().segment(id).spec.file_shape(),
        bytes: match params.file_values(id) {
            Cow::Borrowed(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
            Cow::Owned(values) => Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
        },
    };
    // PEFT misses either name of what two modules share.
    let also = also.clone().map(|also| {
        let data = TensorData::from_f32(params.get(id), shape.clone());
        (also, data)
    });
    std::iter::once((name.clone(), data)).chain(also)
}

/// The weights file, open.
pub(crate) struct Weights {
    pub(crate) path: PathBuf,
    pub(crate) file: SafetensorsFile,
    /// Tensors of which the file holds a part, by name.
    parts: BTreeMap<String, Part>,
}

/// Which rows (or columns, for `axis` 1) of a matrix a file holds; the others are zero.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) axis: usize,
    pub(crate) kept: Vec<bool>,
}

impl Part {
    /// The shape in the file of a matrix of `shape`.
    pub(crate) fn shape(&self, shape: &[usize]) -> Vec<usize> {
        let mut part = shape.to_vec();
        if let Some(length) = part.get_mut(self.axis) {
            *length = self.kept.iter().filter(|kept| **kept).count();
        }
        part
    }

    /// What the file holds of `values`, of `shape`.
    pub(crate) fn take(&self, values: &[f32], shape: &[usize]) -> Vec<f32> {
        let cols = shape[1];
        let kept = |at: &usize| self.kept[[at / cols, at % cols][self.axis]];
        (0..values.len())
            .filter(kept)
            .map(|at| values[at])
            .collect()
    }

    /// The inverse of [`Part::take`].
    fn expand(&self, values: &[f32], shape: &[usize]) -> Vec<f32> {
        let cols = shape[1];
        let mut rest = values.iter().copied();
        (0..shape[0] * cols)
            .map(|at| {
                let kept = self.kept[[at / cols, at % cols][self.axis]];
                if kept {
                    rest.next().unwrap_or_default()
                } else {
                    0.0
                }
            })
            .collect()
    }
}

impl Weights {
    /// Opens the tensors of the adapter in `directory`.
    ///
    /// # Errors
    /// [`Error::Adapter`] if there is a pickle instead, or the file is damaged; [`Error::Read`].
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(WEIGHTS_FILE);
        if !path.exists() && directory.join(PICKLE_FILE).exists() {
            return Err(Error::adapter(
                directory.join(PICKLE_FILE),
                format!(
                    "is a pickle, which can run code when read, and `{WEIGHTS_FILE}` is missing; \
                     save the adapter again with PEFT, which writes safetensors"
                ),
            ));
        }
        let file = SafetensorsFile::open(&path).map_err(as_adapter)?;
        Ok(Self::of(path, file))
    }

    /// The tensors of another file of an adapter.
    pub(crate) fn of(path: PathBuf, file: SafetensorsFile) -> Self {
        let parts = BTreeMap::new();
        Self { path, file, parts }
    }

    /// The same, of which the tensors in `parts` are read with zeros for what is not there.
    pub(crate) fn with_parts(self, parts: BTreeMap<String, Part>) -> Self {
        Self { parts, ..self }
    }

    /// A finite tensor of a known shape.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming the tensor.
    pub(crate) fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let meta = self
            .file
            .meta(name)
            .ok_or_else(|| Error::adapter(&self.path, format!("`{name}` is missing")))?;
        let part = self.parts.get(name);
        let expected = part.map_or_else(|| shape.to_vec(), |part| part.shape(shape));
        if meta.shape != expected {
            return Err(Error::adapter(
                &self.path,
                format!("`{name}` has shape {:?}, expected {expected:?}", meta.shape),
            ));
        }
        let values = self.file.read_f32(name).map_err(as_adapter)?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(match part {
                Some(part) => part.expand(&values, shape),
                None => values,
            }),
            Some(at) => Err(Error::adapter(
                &self.path,
                format!(
                    "`{name}` holds {} at element {at}: the adapter is damaged or its training diverged",
                    values[at]
                ),
            )),
        }
    }

    /// Whole numbers below `limit` of a known shape, in whatever dtype of them.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming the tensor.
    pub(crate) fn read_indices(
        &self,
        name: &str,
        shape: &[usize],
        limit: usize,
    ) -> Result<Vec<usize>> {
        let fail = |message: String| Error::adapter(&self.path, format!("`{name}` {message}"));
        let meta = self.file.meta(name);
        let meta = meta.ok_or_else(|| fail("is missing".into()))?;
        if meta.shape != shape {
            return Err(fail(format!(
                "has shape {:?}, expected {shape:?}",
                meta.shape
            )));
        }
        let bytes = self.file.read_bytes(name).map_err(as_adapter)?;
        let size = match meta.dtype {
            FileDType::U8 | FileDType::I8 => 1,
            FileDType::I16 | FileDType::U16 => 2,
            FileDType::I32 | FileDType::U32 => 4,
            FileDType::I64 | FileDType::U64 => 8,
            other => return Err(fail(format!("is {other:?}, expected whole numbers"))),
        };
        let indices = bytes.chunks_exact(size).map(|bytes| {
            let mut wide = [0; 8];
            wide[..size].copy_from_slice(bytes);
            // A negative number is beyond any limit.
            let index = usize::try_from(u64::from_le_bytes(wide)).unwrap_or(usize::MAX);
            match index < limit {
                true => Ok(index),
                false => Err(fail(format!("holds {index}, expected less than {limit}"))),
            }
        });
        indices.collect()
    }

    /// A finite tensor of `len` elements in whatever shape.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming the tensor.
    pub(crate) fn read_flat(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let shape = self
            .file
            .meta(name)
            .map_or_else(Vec::new, |meta| meta.shape.clone());
        let values = self.read(name, &shape)?;
        if values.len() == len {
            return Ok(values);
        }
        let message = format!("`{name}` has shape {shape:?}, expected {len} elements");
        Err(Error::adapter(&self.path, message))
    }

    /// Refuses a file that lacks a tensor, or holds one that has no place and is not `optional`.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming the first such tensor, with the nearest name.
    pub(crate) fn require_same_names(
        &self,
        expected: &BTreeSet<String>,
        optional: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let present: BTreeSet<&str> = self.file.names().collect();
        let missing: Vec<&str> = expected
            .iter()
            .map(String::as_str)
            .filter(|name| !present.contains(name))
            .collect();
        let extra: Vec<&str> = present
            .iter()
            .copied()
            .filter(|name| !expected.contains(*name) && !optional(name))
            .collect();
        if let Some(name) = missing.first() {
            return Err(Error::adapter(
                &self.path,
                format!(
                    "{} of {} expected tensors are missing, the first is `{name}`{}",
                    missing.len(),
                    expected.len(),
                    suggest::did_you_mean(name, extra.iter().copied()),
                ),
            ));
        }
        if let Some(name) = extra.first() {
            return Err(Error::adapter(
                &self.path,
                format!(
                    "{} tensors have no place in this model and configuration, the first is `{name}`{}",
                    extra.len(),
                    suggest::did_you_mean(name, expected.iter().map(String::as_str)),
                ),
            ));
        }
        Ok(())
    }
}

/// What is wrong with the weights of an adapter is no fault of the model.
fn as_adapter(error: Error) -> Error {
    match error {
        Error::Model { path, message } => Error::Adapter { path, message },
        other => other,
    }
}
