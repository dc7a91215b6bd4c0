//! The files of an adapter, whatever the values are: what is not finite is a finding here, not an error.

use crate::LoraConfig;
use crate::files::{CONFIG_FILE, Weights};
use crate::names::{self, Part};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// Dimensions and values of a tensor.
type Values = (Vec<usize>, Vec<f32>);

/// A low-rank update.
pub(crate) struct Factors {
    /// `[rank, in_features]`.
    pub(crate) a: Vec<f32>,
    /// `[out_features, rank]`.
    pub(crate) b: Vec<f32>,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// `[out_features, in_features]`.
    pub(crate) shape: [usize; 2],
}

pub(crate) struct Adapter {
    pub(crate) peft_type: String,
    pub(crate) config: Map<String, Value>,
    pub(crate) updates: BTreeMap<String, Factors>,
    /// Everything else.
    pub(crate) tensors: BTreeMap<String, Values>,
    pub(crate) bytes: u64,
}

impl Adapter {
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        // Says what is there where no adapter is, and refuses what is no configuration.
        crate::PeftConfig::load(directory)?;
        let path = directory.join(CONFIG_FILE);
        let text = std::fs::read(&path).map_err(Error::read(&path))?;
        let config: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|error| Error::adapter(&path, format!("is no JSON object: {error}")))?;
        let peft_type = config.get("peft_type").and_then(Value::as_str);
        let peft_type = peft_type.unwrap_or_default().to_owned();
        let weights = Weights::open(directory)?;
        let mut tensors = BTreeMap::new();
        for name in weights.file.names() {
            let shape = weights.file.meta(name).map(|meta| meta.shape.clone());
            let values = weights.file.read_f32(name)?;
            tensors.insert(name.to_owned(), (shape.unwrap_or_default(), values));
        }
        let bytes = std::fs::metadata(&weights.path).map_err(Error::read(&weights.path))?;
        let updates = match peft_type.as_str() {
            "LORA" => updates(&path, &config, &mut tensors)?,
            _ => BTreeMap::new(),
        };
        Ok(Self {
            peft_type,
            config,
            updates,
            tensors,
            bytes: bytes.len(),
        })
    }
}

impl Adapter {
    /// The smallest and the largest of a module's trained row norms.
    pub(super) fn magnitudes(&self, module: &str) -> Option<[f64; 2]> {
        let (_, values) = self.tensors.get(&names::tensor(module, Part::Magnitude))?;
        let values = values.iter().map(|v| f64::from(*v));
        let range = values.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], v| {
            [low.min(v), high.max(v)]
        });
        Some(range)
    }
}

/// Takes the factors out of `tensors`.
fn updates(
    path: &Path,
    config: &Map<String, Value>,
    tensors: &mut BTreeMap<String, Values>,
) -> Result<BTreeMap<String, Factors>> {
    let config = LoraConfig::from_json(path, config)?;
    let kinds = [(Part::A, Part::B), (Part::EmbeddingA, Part::EmbeddingB)];
    let modules: Vec<(String, (Part, Part))> = tensors
        .keys()
        .filter_map(|name| {
            let (module, part) = names::parse(name)?;
            let kind = kinds.into_iter().find(|(a, _)| *a == part)?;
            Some((module.to_owned(), kind))
        })
        .collect();
    let paths: Vec<&str> = modules.iter().map(|(module, _)| module.as_str()).collect();
    let values = config
        .rank_and_alpha()
        .resolve(&paths)
        .map_err(|error| error.of_adapter(path.parent().unwrap_or(path)))?;
    let mut updates = BTreeMap::new();
    for ((module, parts), (by_name, alpha)) in modules.into_iter().zip(values) {
        let (a, b) = (
            names::tensor(&module, parts.0),
            names::tensor(&module, parts.1),
        );
        let taken = [&a, &b].map(|name| tensors.remove(name));
        let [Some((a_shape, a_values)), Some((b_shape, b_values))] = taken else {
            return Err(Error::adapter(
                path,
                format!("`{b}` is missing beside `{a}`"),
            ));
        };
        let ([rank, inputs], [outputs, of_b]) = (&a_shape[..], &b_shape[..]) else {
            let message = format!("`{a}` is {a_shape:?} and `{b}` {b_shape:?}: no matrices");
            return Err(Error::adapter(path, message));
        };
        if rank != of_b || *rank == 0 {
            let message =
                format!("`{a}` is {a_shape:?} and `{b}` {b_shape:?}: of two ranks, or none");
            return Err(Error::adapter(path, message));
        }
        let factors = Factors {
            rank: *rank,
            // A head that is tied has the embedding's rank, and its own says how it scales.
            scale: config.scale(by_name, alpha),
            shape: [*outputs, *inputs],
            a: a_values,
            b: b_values,
        };
        updates.insert(module, factors);
    }
    Ok(updates)
}
