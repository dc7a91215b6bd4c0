//! Weights that a checkpoint holds as codes: which there are, in which format, and their parts.
//!
//! A format is a file here that finds its weights among the names of the tensors, checks their parts against
//! each other before anything is read, and reads one.

mod four_bit;
mod int8;

use super::ModelFiles;
use crate::{Error, Result};
use ferrotune_kernels::dequantise::{FourBitFormat, QuantFormat, Quantised};
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
        Ok(found)
    }

    pub(super) fn get(&self, name: &str) -> Option<&Stored> {
        self.weights.get(name)
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
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::FourBit(state) => state.format.quant_type.as_str(),
            Self::Int8(_) => "int8",
        }
    }

    /// The format, where values can be brought into it.
    pub(super) fn format(&self) -> Option<QuantFormat> {
        match self {
            Self::FourBit(state) => Some(QuantFormat::FourBit(state.format)),
            Self::Int8(state) => Some(QuantFormat::Int8 {
                threshold: state.threshold,
            }),
        }
    }

    pub(super) fn four_bit_format(&self) -> Option<FourBitFormat> {
        match self {
            Self::FourBit(state) => Some(state.format),
            Self::Int8(_) => None,
        }
    }

    /// Bytes that the weight takes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.format()
            .map_or(0, |format| format.bytes(*self.shape()))
    }

    /// Reads the weight into host memory.
    pub(super) fn read(&self, files: &ModelFiles, weight: &str) -> Result<Quantised> {
        Ok(match self {
            Self::FourBit(state) => Quantised::FourBit(state.read_weight(files, weight)?),
            Self::Int8(state) => Quantised::Int8(state.read_weight(files, weight)?),
        })
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
