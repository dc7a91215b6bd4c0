//! `LLM.int8()` weights in safetensors, as bitsandbytes saves them.
//!
//! | name | holds |
//! |---|---|
//! | `MODULE.weight` | i8 `[out, in]` |
//! | `MODULE.SCB` | f32 `[out]`, the largest magnitude of every row, which 127 stands for |
//! | `MODULE.weight_format` | u8, 0: row by row; older files lack it |
//!
//! # Source
//! `Linear8bitLt._save_to_state_dict` of bitsandbytes 0.50.

use crate::io::{FileDType, ModelFiles, TensorMeta};
use crate::{Error, Result};
use ferrotune_kernels::dequantise::Int8;
use serde_json::Value;
use std::collections::BTreeMap;

const SCALES: &str = "SCB";
const LAYOUT: &str = "weight_format";
/// The one layout that is written today; others were for GPUs of their time.
const ROW_BY_ROW: u8 = 0;

/// What a file says of one weight.
#[derive(Clone, Copy, Debug)]
pub(in crate::io) struct Int8State {
    /// `[out, in]`.
    pub(in crate::io) shape: [usize; 2],
    pub(in crate::io) threshold: f32,
}

/// The tensors of `weight` beside itself.
pub(super) fn parts(weight: &str) -> [String; 2] {
    [SCALES, LAYOUT].map(|part| sibling(weight, part))
}

/// The 8-bit weights of a model by name.
///
/// # Errors
/// [`Error::Model`] for bytes without scales, scales of another length or without bytes, and for another
/// layout.
pub(super) fn states(files: &ModelFiles, settings: &Value) -> Result<BTreeMap<String, Int8State>> {
    let threshold = threshold(files, settings)?;
    let mut states = BTreeMap::new();
    for name in files.names() {
        let part = name
            .rsplit_once('.')
            .filter(|(_, last)| [SCALES, LAYOUT].contains(last));
        if let Some((module, part)) = part {
            let weight = format!("{module}.weight");
            if files.meta(&weight).is_none() {
                let message =
                    format!("tensor `{name}` is the {part} of `{weight}`, which is missing");
                return Err(Error::model(files.file_of(name), message));
            }
            if let Some(meta) = files.meta(&weight).filter(|m| m.dtype != FileDType::I8) {
                let message = format!(
                    "tensor `{weight}` is {}, and `{name}` says that it is in 8 bits: expected I8",
                    meta.dtype
                );
                return Err(Error::model(files.file_of(&weight), message));
            }
        }
        let Some(meta) = files.meta(name).filter(|m| m.dtype == FileDType::I8) else {
            continue;
        };
        if name.ends_with(".weight") {
            let shape = check(files, name, meta)?;
            states.insert(name.to_owned(), Int8State { shape, threshold });
        }
    }
    Ok(states)
}

fn threshold(files: &ModelFiles, settings: &Value) -> Result<f32> {
    match settings.get("llm_int8_threshold") {
        None | Some(Value::Null) => Ok(Int8::THRESHOLD),
        Some(value) => match value.as_f64() {
            Some(number) if number >= 0.0 && (number as f32).is_finite() => Ok(number as f32),
            _ => Err(Error::model(
                files.directory().join("config.json"),
                format!("`llm_int8_threshold` is {value}; expected a number of 0 or more"),
            )),
        },
    }
}

/// The shape of `weight`, whose parts fit it.
fn check(files: &ModelFiles, weight: &str, meta: &TensorMeta) -> Result<[usize; 2]> {
    let [rows, cols] = meta.shape[..] else {
        let message = format!(
            "8-bit tensor `{weight}` has shape {:?}; expected a matrix",
            meta.shape
        );
        return Err(Error::model(files.file_of(weight), message));
    };
    let name = sibling(weight, SCALES);
    let found = match files.meta(&name) {
        Some(scales) if scales.dtype == FileDType::F32 && scales.len() == rows => None,
        Some(scales) => Some(format!("is {} {:?}", scales.dtype, scales.shape)),
        None => Some("is missing".to_owned()),
    };
    if let Some(found) = found {
        let message = format!(
            "tensor `{name}` {found}; the 8-bit tensor `{weight}` of shape {:?} needs F32 [{rows}], a scale per row; \
             save the model again with bitsandbytes 0.43 or newer",
            meta.shape
        );
        return Err(Error::model(files.file_of(weight), message));
    }
    let layout = sibling(weight, LAYOUT);
    if files.meta(&layout).is_some() {
        let value = files.read_bytes(&layout)?;
        if value != [ROW_BY_ROW] {
            let message = format!(
                "`{layout}` is {value:?}; expected [{ROW_BY_ROW}], row by row: save the model again with bitsandbytes \
                 0.43 or newer"
            );
            return Err(Error::model(files.file_of(&layout), message));
        }
    }
    Ok([rows, cols])
}

impl Int8State {
    /// Reads the weight into host memory.
    pub(super) fn read_weight(&self, files: &ModelFiles, weight: &str) -> Result<Int8> {
        let name = sibling(weight, SCALES);
        let scales = files.read_f32(&name)?;
        if let Some(row) = scales.iter().position(|s| !s.is_finite() || *s < 0.0) {
            let message = format!(
                "`{name}` is {} for row {row}; expected a number of 0 or more: the file is damaged",
                scales[row]
            );
            return Err(Error::model(files.file_of(&name), message));
        }
        let bytes = files.read_bytes(weight)?;
        let values = bytes.into_iter().map(u8::cast_signed).collect();
        Ok(Int8::new(self.shape, values, scales)?.with_threshold(self.threshold))
    }
}

fn sibling(weight: &str, part: &str) -> String {
    match weight.rsplit_once('.') {
        Some((module, _)) => format!("{module}.{part}"),
        None => part.to_owned(),
    }
}
