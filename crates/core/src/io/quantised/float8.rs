//! Weights of 8-bit floats (e4m3) in safetensors, with scales that multiply them.
//!
//! | name | holds |
//! |---|---|
//! | `MODULE.weight` | F8_E4M3 `[out, in]` |
//! | `MODULE.weight_scale_inv` | a scale per block, `[out / 128, in / 128]` rounded up, or one (Transformers' `fp8`) |
//! | `MODULE.weight_scale` | a scale per row, `[out, 1]` or `[out]`, or one, or per block (`compressed-tensors`, `fbgemm_fp8`) |
//!
//! Scales of activations beside them are left alone: inputs stay as they are here.
//!
//! # Source
//! `FP8Linear` of Transformers 5, `float-quantized` of compressed-tensors 0.12.

use super::sibling;
use crate::io::{FileDType, ModelFiles};
use crate::{Error, Result};
use ferrotune_kernels::dequantise::Float8;
use serde_json::Value;
use std::collections::BTreeMap;

const SCALES: [&str; 2] = ["weight_scale_inv", "weight_scale"];
/// Of activations, which are not quantised here.
const ACTIVATIONS: [&str; 3] = ["input_scale", "input_scale_ub", "activation_scale"];
const FLOATS: [FileDType; 3] = [FileDType::F32, FileDType::F16, FileDType::BF16];

/// What a file says of one weight.
#[derive(Clone, Debug)]
pub(in crate::io) struct Float8State {
    /// `[out, in]`.
    pub(in crate::io) shape: [usize; 2],
    /// Rows and columns that share a scale.
    pub(in crate::io) block: [usize; 2],
    scales: String,
}

/// The tensors of `weight` beside itself.
pub(super) fn parts(weight: &str) -> impl Iterator<Item = String> {
    let parts = SCALES.iter().chain(&ACTIVATIONS);
    parts.map(|part| sibling(weight, part))
}

/// The weights of 8-bit floats of a model by name.
///
/// # Errors
/// [`Error::Model`] for codes without scales, scales of another shape or without codes, and for another kind of
/// 8-bit floats.
pub(super) fn states(
    files: &ModelFiles,
    settings: &Value,
) -> Result<BTreeMap<String, Float8State>> {
    let mut states = BTreeMap::new();
    for name in files.names() {
        let fault = |message: String| Error::model(files.file_of(name), message);
        let dtype = files.meta(name).map(|meta| meta.dtype);
        if dtype == Some(FileDType::F8_E5M2) {
            return Err(fault(format!(
                "tensor `{name}` is F8_E5M2; supported is F8_E4M3"
            )));
        }
        if let Some((module, part)) = name.rsplit_once('.')
            && SCALES.contains(&part)
        {
            let weight = format!("{module}.weight");
            let found = files.meta(&weight).map(|meta| meta.dtype);
            if found != Some(FileDType::F8_E4M3) {
                let found = found.map_or("missing".to_owned(), |dtype| dtype.to_string());
                let message = format!(
                    "tensor `{name}` scales `{weight}`, which is {found}; expected F8_E4M3"
                );
                return Err(fault(message));
            }
        }
        if dtype == Some(FileDType::F8_E4M3) && name.ends_with(".weight") {
            let state = Float8State::check(files, settings, name).map_err(fault)?;
            states.insert(name.to_owned(), state);
        }
    }
    Ok(states)
}

impl Float8State {
    fn check(files: &ModelFiles, settings: &Value, weight: &str) -> Result<Self, String> {
        let shape = files.meta(weight).map_or(&[][..], |meta| &meta.shape);
        let [rows, cols] = *shape else {
            return Err(format!(
                "tensor `{weight}` of 8-bit floats has shape {shape:?}; expected a matrix"
            ));
        };
        let names = SCALES.map(|part| sibling(weight, part));
        let Some(scales) = names.iter().find(|name| files.meta(name).is_some()) else {
            return Err(format!(
                "tensor `{}` or `{}` is missing: the 8-bit floats of `{weight}` need scales",
                names[0], names[1]
            ));
        };
        let (dtype, found) = match files.meta(scales) {
            Some(meta) => (meta.dtype, &meta.shape[..]),
            None => return Err(format!("tensor `{scales}` is missing")),
        };
        let block = match *found {
            [] | [1] | [1, 1] => Some([rows.max(1), cols.max(1)]),
            [n] | [n, 1] if n == rows => Some([1, cols.max(1)]),
            [a, b] => Some(block_size(settings))
                .filter(|block| [a, b] == [rows.div_ceil(block[0]), cols.div_ceil(block[1])]),
            _ => None,
        };
        match block.filter(|_| FLOATS.contains(&dtype)) {
            Some(block) => Ok(Self {
                shape: [rows, cols],
                block,
                scales: scales.clone(),
            }),
            None => {
                let [a, b] = block_size(settings);
                Err(format!(
                    "tensor `{scales}` is {dtype} {found:?}; `{weight}` of shape {shape:?} needs floats: one, [{rows}, \
                     1], or {:?} for blocks of [{a}, {b}]",
                    [rows.div_ceil(a), cols.div_ceil(b)]
                ))
            }
        }
    }

    /// Reads the weight into host memory.
    pub(super) fn read_weight(&self, files: &ModelFiles, weight: &str) -> Result<Float8> {
        let scales = files.read_f32(&self.scales)?;
        super::check_finite(files, &self.scales, &scales)?;
        let codes = files.read_bytes(weight)?;
        if let Some(at) = codes.iter().position(|code| code & 0x7f == 0x7f) {
            let message = format!("`{weight}` is NaN at element {at}: the file is damaged");
            return Err(Error::model(files.file_of(weight), message));
        }
        Ok(Float8::new(self.shape, self.block, codes, scales)?)
    }
}

/// Rows and columns that share a scale where scales are those of blocks.
fn block_size(settings: &Value) -> [usize; 2] {
    let sizes = settings.get("weight_block_size").and_then(Value::as_array);
    let size = |i: usize| {
        sizes
            .and_then(|sizes| sizes.get(i)?.as_u64())
            .filter(|n| *n > 0)
    };
    [0, 1].map(|i| size(i).map_or(128, |n| n as usize))
}
