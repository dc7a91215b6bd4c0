use ferrotune_core::data::PackedBatch;
use ferrotune_core::io::{FileDType, SafetensorsFile};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Device};
use serde_json::Value;
use std::path::{Path, PathBuf};

use super::padded::PaddedBatch;

/// A case folder.
#[derive(Debug)]
pub struct Case {
    /// Where it is.
    pub directory: PathBuf,
    /// What it holds.
    pub kind: String,
    /// Its whole case.json.
    pub json: Value,
    /// Where to recompute it.
    pub device: Device,
}

impl Case {
    /// Reads `directory/case.json`, to be recomputed on `device`.
    ///
    /// # Errors
    /// [`Error::Data`] if it is missing, not JSON, or names no kind.
    pub fn open(directory: &Path, device: &Device) -> Result<Self> {
        let path = directory.join("case.json");
        let json = read_json(&path)?;
        let Some(kind) = json.get("kind").and_then(Value::as_str) else {
            return Err(Error::data(
                &path,
                None,
                "`kind` is missing; expected a string",
            ));
        };
        Ok(Self {
            directory: directory.into(),
            kind: kind.to_owned(),
            json,
            device: device.clone(),
        })
    }

    /// A file of the case.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The base model's folder: relative to the folder that holds `adapters/_bases`.
    pub(super) fn base(&self) -> Result<PathBuf> {
        let Some(base) = self.json.get("base").and_then(Value::as_str) else {
            return Err(Error::data(
                self.path("case.json"),
                None,
                "`base` is missing; expected a path",
            ));
        };
        self.above(base, "config.json")
    }

    /// The folder `name`, which holds `file`, in a folder above this case.
    pub(super) fn above(&self, name: &str, file: &str) -> Result<PathBuf> {
        let directory = self
            .directory
            .canonicalize()
            .map_err(Error::read(&self.directory))?;
        let found = directory
            .ancestors()
            .map(|up| up.join(name))
            .find(|p| p.join(file).is_file());
        found.ok_or_else(|| {
            Error::data(
                self.path("case.json"),
                None,
                format!("`{name}` with {file} is in no folder above this case"),
            )
        })
    }

    /// A number of case.json by its path of keys.
    pub(super) fn number(&self, keys: &[&str]) -> Option<f64> {
        keys.iter()
            .try_fold(&self.json, |value, key| value.get(key))
            .and_then(Value::as_f64)
    }
}

/// Reads a JSON file.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::data(path, e.line() as u64, format!("is not valid JSON: {e}")))
}

/// The keyword arguments of a forward call: `inputs.safetensors`, or a prefix of another file.
pub(super) fn inputs(file: &SafetensorsFile, prefix: &str) -> Result<PaddedBatch> {
    let name = format!("{prefix}input_ids");
    let shape = file
        .meta(&name)
        .map(|m| m.shape.clone())
        .unwrap_or_default();
    let [rows, cols] = shape[..] else {
        let message = format!("`{name}` must be [rows, columns]");
        return Err(Error::data(file.path(), None, message));
    };
    let read = |name: &str| -> Result<Option<Vec<i64>>> {
        let name = format!("{prefix}{name}");
        let Some(meta) = file.meta(&name) else {
            return Ok(None);
        };
        if meta.shape != shape {
            let message = format!(
                "`{name}` is {:?}, expected {shape:?} like input_ids; or [rows], of a classifier",
                meta.shape
            );
            return Err(Error::data(file.path(), None, message));
        }
        file.read_i64(&name).map(Some)
    };
    let labels = format!("{prefix}labels");
    let of_rows = file.meta(&labels).is_some_and(|meta| meta.shape == [rows]);
    let (labels, classes) = match of_rows {
        true => (None, Some(file.read_i64(&labels)?)),
        false => (read("labels")?, None),
    };
    let batch = PaddedBatch {
        rows,
        cols,
        input_ids: read("input_ids")?.unwrap_or_default(),
        labels,
        classes,
        attention_mask: read("attention_mask")?,
        position_ids: read("position_ids")?,
    };
    let mut unsigned = batch
        .input_ids
        .iter()
        .chain(batch.position_ids.iter().flatten());
    if let Some(bad) = unsigned.find(|v| u32::try_from(**v).is_err()) {
        return Err(Error::data(
            file.path(),
            None,
            format!("{bad} is no token id or position"),
        ));
    }
    Ok(batch)
}

/// A recorded tensor of one element.
pub(super) fn scalar(file: &SafetensorsFile, name: &str) -> Result<f64> {
    let values = file.read_f32(name)?;
    match values[..] {
        [value] => Ok(f64::from(value)),
        _ => {
            let message = format!("`{name}` has {} elements, expected one", values.len());
            Err(Error::data(file.path(), None, message))
        }
    }
}

/// bf16 if the file's matrices are.
pub(super) fn dtype_of(file: &SafetensorsFile) -> DType {
    let bf16 = file
        .names()
        .any(|n| file.meta(n).is_some_and(|m| m.dtype == FileDType::BF16));
    if bf16 { DType::Bf16 } else { DType::F32 }
}

/// Longest micro-batch, for the workspace.
pub(super) fn longest<'a>(batches: impl IntoIterator<Item = &'a PackedBatch>) -> usize {
    batches
        .into_iter()
        .map(PackedBatch::tokens)
        .max()
        .unwrap_or(0)
}
