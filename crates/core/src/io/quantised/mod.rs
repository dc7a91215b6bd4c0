//! Weights that a checkpoint holds as codes: which there are, in which format, and their parts.
//!
//! A format is a file here that finds its weights among the names of the tensors, checks their parts against
//! each other before anything is read, and reads one.

mod float8;
mod four_bit;
mod int8;
mod packed;

use super::ModelFiles;
use super::gguf::GgmlState;
use crate::{Error, Result};
use ferrotune_kernels::dequantise::{Float8, FourBitFormat, Grouped, QuantFormat, Quantised};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The weights of a model that are codes.
#[derive(Debug, Default)]
pub(super) struct QuantisedWeights {
    /// By the name that the weight has in a model of values.
    weights: BTreeMap<String, Stored>,
    /// Names of tensors that belong to one of them, beside one of its own name.
    parts: BTreeSet<String>,
}

/// How one weight is held, checked against the lengths of its parts.
#[derive(Clone, Debug)]
pub(super) enum Stored {
    FourBit(four_bit::QuantState),
    Int8(int8::Int8State),
    Float8(float8::Float8State),
    Packed(packed::PackedState),
    Ggml(GgmlState),
}

impl QuantisedWeights {
    /// Those of `files`; `settings` is `quantization_config` of the model's configuration, or null.
    ///
    /// # Errors
    /// [`Error::Model`] for parts that do not fit together, or one that is missing.
    pub(super) fn find(files: &ModelFiles, settings: &Value) -> Result<Self> {
        let mut found = Self::default();
        for (weight, state) in four_bit::quant_states(files)? {
            found.parts.extend(state.parts(&weight));
            found.weights.insert(weight, Stored::FourBit(state));
        }
        for (weight, state) in int8::states(files, settings)? {
            found.parts.extend(int8::parts(&weight));
            found.weights.insert(weight, Stored::Int8(state));
        }
        for (weight, state) in float8::states(files, settings)? {
            found.parts.extend(float8::parts(&weight));
            found.weights.insert(weight, Stored::Float8(state));
        }
        for (weight, state) in packed::states(files, settings)? {
            found.parts.extend(packed::parts(&weight));
            found.weights.insert(weight, Stored::Packed(state));
        }
        for (weight, state) in files.ggml_weights() {
            found
                .weights
                .insert(weight.clone(), Stored::Ggml(state.clone()));
        }
        match reads(settings) && found.weights.is_empty() {
            true => Err(none_found(files, settings)),
            false => Ok(found),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Stored> {
        self.weights.get(name)
    }

    /// Names of the packed weights.
    pub(super) fn packed(&self) -> impl Iterator<Item = &str> {
        let packed = self.weights.iter();
        let packed = packed.filter(|(_, stored)| matches!(stored, Stored::Packed(_)));
        packed.map(|(name, _)| name.as_str())
    }

    /// Names and shapes of the weights.
    pub(super) fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        let weights = self.weights.iter();
        weights.map(|(name, stored)| (name.as_str(), stored.shape().as_slice()))
    }

    /// Whether tensor `name` is a part of one, or one itself.
    pub(super) fn covers(&self, name: &str) -> bool {
        self.weights.contains_key(name) || self.parts.contains(name)
    }

    /// The name of their format: of the first, since all of a checkpoint are alike.
    pub(super) fn name(&self) -> Option<&'static str> {
        self.weights.values().next().map(Stored::name)
    }
}

impl Stored {
    pub(super) fn shape(&self) -> &[usize; 2] {
        match self {
            Self::FourBit(state) => &state.shape,
            Self::Int8(state) => &state.shape,
            Self::Float8(state) => &state.shape,
            Self::Packed(state) => &state.shape,
            Self::Ggml(state) => &state.shape,
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::FourBit(state) => state.format.quant_type.as_str(),
            Self::Int8(_) => "int8",
            Self::Float8(_) => "fp8",
            Self::Packed(state) => state.name(),
            Self::Ggml(state) => state.kind.name(),
        }
    }

    /// The format, where values can be brought into it.
    pub(super) fn format(&self) -> Option<QuantFormat> {
        match self {
            Self::FourBit(state) => Some(QuantFormat::FourBit(state.format)),
            Self::Int8(state) => Some(QuantFormat::Int8 {
                threshold: state.threshold,
            }),
            Self::Float8(_) | Self::Packed(_) | Self::Ggml(_) => None,
        }
    }

    pub(super) fn four_bit_format(&self) -> Option<FourBitFormat> {
        match self {
            Self::FourBit(state) => Some(state.format),
            _ => None,
        }
    }

    /// Bytes that the weight takes in memory.
    pub(super) fn bytes(&self) -> usize {
        let shape = *self.shape();
        let len = shape[0] * shape[1];
        match self {
            Self::FourBit(state) => state.format.bytes(len),
            Self::Int8(state) => {
                let threshold = state.threshold;
                QuantFormat::Int8 { threshold }.bytes(shape)
            }
            Self::Float8(state) => Float8::bytes(shape, state.block),
            Self::Packed(state) => Grouped::bytes(shape, state.bits(), state.groups),
            Self::Ggml(state) => state.kind.bytes(len),
        }
    }

    /// Reads the weight into host memory.
    pub(super) fn read(&self, files: &ModelFiles, weight: &str) -> Result<Quantised> {
        Ok(match self {
            Self::FourBit(state) => Quantised::FourBit(state.read_weight(files, weight)?),
            Self::Int8(state) => Quantised::Int8(state.read_weight(files, weight)?),
            Self::Float8(state) => Quantised::Float8(state.read_weight(files, weight)?),
            Self::Packed(state) => Quantised::Grouped(state.read_weight(files, weight)?),
            Self::Ggml(state) => Quantised::Ggml(state.weight(files.read_bytes(weight)?)?),
        })
    }
}

/// Whether weights under this `quantization_config` are among those that are read.
pub(crate) fn reads(settings: &Value) -> bool {
    let is = |key: &str| settings.get(key) == Some(&Value::Bool(true));
    let text = |key: &str| settings.get(key).and_then(Value::as_str);
    match text("quant_method").unwrap_or("bitsandbytes") {
        "bitsandbytes" => is("load_in_4bit") || is("load_in_8bit"),
        "compressed-tensors" => {
            matches!(text("format"), Some("float-quantized" | "naive-quantized"))
        }
        "fp8" | "fbgemm_fp8" | "gptq" | "awq" | "gguf" => true,
        _ => false,
    }
}

/// What to say of files of values under a configuration of codes.
fn none_found(files: &ModelFiles, settings: &Value) -> Error {
    let method = settings.get("quant_method").and_then(Value::as_str);
    let message = format!(
        "`quantization_config` says that weights are quantised ({}), but none in the files is; give the files that it \
         belongs to, or, for these, the config.json of the original, without it",
        method.unwrap_or("bitsandbytes")
    );
    Error::model(files.dir.join("config.json"), message)
}

/// The name of `part` beside `weight`.
fn sibling(weight: &str, part: &str) -> String {
    match weight.rsplit_once('.') {
        Some((module, _)) => format!("{module}.{part}"),
        None => part.to_owned(),
    }
}

/// Refuses scales that are no numbers.
fn check_finite(files: &ModelFiles, name: &str, scales: &[f32]) -> Result<()> {
    match scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let message = format!(
                "`{name}` is {} at element {at}: the file is damaged",
                scales[at]
            );
            Err(Error::model(files.file_of(name), message))
        }
    }
}

/// `quantization_config` of the `config.json` in `dir`; null without one.
///
/// # Errors
/// [`Error::Read`], or [`Error::Model`] if it is not JSON.
pub(super) fn settings(dir: &Path) -> Result<Value> {
    let path = dir.join("config.json");
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = std::fs::read(&path).map_err(Error::read(&path))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|e| Error::model(&path, format!("is not valid JSON: {e}")))?;
    let settings = config.get_mut("quantization_config");
    Ok(settings.map_or(Value::Null, Value::take))
}
