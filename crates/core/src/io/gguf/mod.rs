//! Models in GGUF: a header of keys and tensors, as llama.cpp writes it, read as a model directory would be.
//!
//! Tensors get the names and shapes that a checkpoint of Transformers has, and its keys become a `config.json`.
//! llama.cpp interleaves the two halves of every head in the rows of q and k of the `llama` architecture, for its
//! kind of rotation; those rows are put back where a weight is read.
//!
//! # Source
//! The GGUF specification of ggml, versions 2 and 3; `convert_hf_to_gguf.py` of llama.cpp for the names.

mod header;
mod names;

use super::FileDType;
use super::safetensors_file::SafetensorsFile;
use super::safetensors_header::{Entry, TensorMeta};
use crate::{Error, Result};
use ferrotune_kernels::dequantise::{Ggml, GgmlType};
use header::{Header, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Architectures whose names and keys are known, which are model types of Transformers too.
const ARCHITECTURES: [&str; 3] = ["llama", "qwen2", "qwen3"];
/// Rows in this many places are interleaved, where they are.
const HALVES: usize = 2;

/// What a file says of its quantised weights, by their names in Transformers.
#[derive(Debug, Default)]
pub(super) struct Gguf {
    weights: BTreeMap<String, GgmlState>,
}

/// One quantised weight.
#[derive(Clone, Debug)]
pub(super) struct GgmlState {
    /// `[out, in]`.
    pub(super) shape: [usize; 2],
    pub(super) kind: GgmlType,
    /// Heads whose halves are interleaved in its rows.
    interleaved: Option<usize>,
}

/// The one GGUF file in `dir`, if there is one.
///
/// # Errors
/// [`Error::Model`] if there are several.
pub(crate) fn find(dir: &Path) -> Result<Option<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(Error::read(dir))?;
    let paths = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
    let mut found: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .collect();
    found.sort();
    match &found[..] {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [one, two, ..] => Err(Error::model(
            one,
            format!(
                "is one of {} GGUF files in its directory, {} another; expected one model, in one file",
                found.len(),
                two.display()
            ),
        )),
    }
}

/// The `config.json` that the keys of a file amount to.
///
/// # Errors
/// [`Error::Model`] if it is not sound, of another architecture, or lacks a key.
pub(crate) fn config(path: &Path) -> Result<Value> {
    let (header, _) = Header::open(path)?;
    let fault = |message: String| Error::model(path, message);
    let arch = architecture(&header).map_err(fault)?;
    let key = |name: &str| header.keys.get(&format!("{arch}.{name}"));
    let size = |name: &str| {
        let value = key(name).and_then(Value::as_u64).filter(|n| *n > 0);
        value.ok_or_else(|| {
            fault(format!(
                "key `{arch}.{name}` is missing, or no number above 0"
            ))
        })
    };
    let number = |name: &str| key(name).and_then(Value::as_f64);
    if header.tensors.contains_key("rope_freqs.weight") {
        let message = "has `rope_freqs.weight`, scaled positions whose numbers its keys lack; put the config.json of \
                       the original model beside it";
        return Err(fault(message.into()));
    }
    let scaling = key("rope.scaling.type")
        .and_then(Value::as_str)
        .unwrap_or("none");
    let rope_scaling = match scaling {
        "none" => Value::Null,
        "linear" => {
            json!({"rope_type": "linear", "factor": number("rope.scaling.factor").unwrap_or(1.0)})
        }
        other => {
            let message = format!(
                "key `{arch}.rope.scaling.type` is {other}; supported are none and linear: put the config.json of the \
                 original model beside it"
            );
            return Err(fault(message));
        }
    };
    let embedding = header.tensors.get("token_embd.weight");
    let embedding =
        embedding.ok_or_else(|| fault("tensor `token_embd.weight` is missing".into()))?;
    let heads = size("attention.head_count")?;
    let hidden = size("embedding_length")?;
    let mut config = json!({
        "model_type": arch,
        "vocab_size": embedding.shape.first(),
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length")?,
        "num_hidden_layers": size("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv").unwrap_or(heads),
        "head_dim": size("attention.key_length").unwrap_or(hidden / heads),
        "max_position_embeddings": size("context_length")?,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon").unwrap_or(1e-5),
        "rope_theta": number("rope.freq_base").unwrap_or(10_000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": !header.tensors.contains_key("output.weight"),
        "quantization_config": {"quant_method": "gguf"},
    });
    if !rope_scaling.is_null() {
        config["rope_scaling"] = rope_scaling;
    }
    Ok(config)
}

/// Opens a file as the tensors of a model of Transformers.
///
/// # Errors
/// [`Error::Model`] if it is not sound, of another architecture, or has a tensor of a type or name that is not known.
pub(super) fn open(path: &Path) -> Result<(SafetensorsFile, Gguf)> {
    let (header, file) = Header::open(path)?;
    let fault = |message: String| Error::model(path, message);
    let arch = architecture(&header).map_err(fault)?.to_owned();
    let heads = |name: &str| {
        let value = header.keys.get(&format!("{arch}.attention.{name}"));
        value.and_then(Value::as_u64).map(|n| n as usize)
    };
    let mut entries = BTreeMap::new();
    let mut found = Gguf::default();
    for (own, tensor) in &header.tensors {
        if own == "rope_freqs.weight" {
            continue;
        }
        let name = names::of(own).ok_or_else(|| {
            fault(format!(
                "tensor `{own}` is none that a model of the architecture {arch} has"
            ))
        })?;
        let interleaved = match (arch.as_str(), names::projection(own)) {
            ("llama", Some("attn_q")) => heads("head_count"),
            ("llama", Some("attn_k")) => heads("head_count_kv").or_else(|| heads("head_count")),
            _ => None,
        };
        let entry = entry(own, tensor, interleaved, &name, &mut found).map_err(fault)?;
        if entry.offset + entry.bytes as u64 > header.length {
            let message = format!("ends inside tensor `{own}`; was the download cut off?");
            return Err(fault(message));
        }
        entries.insert(name, entry);
    }
    Ok((SafetensorsFile::of_parts(path, file, entries), found))
}

fn architecture(header: &Header) -> Result<&str, String> {
    let found = header
        .keys
        .get("general.architecture")
        .and_then(Value::as_str);
    match found {
        Some(arch) if ARCHITECTURES.contains(&arch) => Ok(arch),
        Some(arch) => Err(format!(
            "`general.architecture` is {arch}; supported as GGUF are {}",
            ARCHITECTURES.join(", ")
        )),
        None => Err("key `general.architecture` is missing".into()),
    }
}

/// Where a tensor lies, as values or as the bytes of a quantised weight, which `found` then says more of.
fn entry(
    own: &str,
    tensor: &Tensor,
    interleaved: Option<usize>,
    name: &str,
    found: &mut Gguf,
) -> Result<Entry, String> {
    let float = |dtype, size: usize| {
        if interleaved.is_some() {
            return Err(format!(
                "tensor `{own}` is of floats whose rows are interleaved; supported for attention of llama are \
                 quantised weights"
            ));
        }
        let meta = TensorMeta {
            dtype,
            shape: tensor.shape.clone(),
        };
        let bytes = meta.len() * size;
        Ok(Entry {
            meta,
            offset: tensor.offset,
            bytes,
        })
    };
    let kind = match tensor.kind {
        0 => return float(FileDType::F32, 4),
        1 => return float(FileDType::F16, 2),
        30 => return float(FileDType::BF16, 2),
        2 => GgmlType::Q4_0,
        8 => GgmlType::Q8_0,
        12 => GgmlType::Q4K,
        14 => GgmlType::Q6K,
        other => {
            return Err(format!(
                "tensor `{own}` is of the ggml type {other}; supported are F32, F16, BF16, q4_0, q8_0, q4_K and q6_K"
            ));
        }
    };
    let [rows, cols] = tensor.shape[..] else {
        return Err(format!(
            "quantised tensor `{own}` has shape {:?}; expected a matrix",
            tensor.shape
        ));
    };
    if !cols.is_multiple_of(kind.weights()) {
        return Err(format!(
            "tensor `{own}` has {cols} columns; {} has blocks of {}",
            kind.name(),
            kind.weights()
        ));
    }
    if let Some(heads) = interleaved
        && (heads == 0 || !rows.is_multiple_of(heads * HALVES))
    {
        return Err(format!(
            "tensor `{own}` has {rows} rows, which {heads} heads do not share evenly"
        ));
    }
    let state = GgmlState {
        shape: [rows, cols],
        kind,
        interleaved,
    };
    found.weights.insert(name.to_owned(), state);
    let bytes = kind.bytes(rows * cols);
    Ok(Entry {
        meta: TensorMeta {
            dtype: FileDType::U8,
            shape: vec![bytes],
        },
        offset: tensor.offset,
        bytes,
    })
}

impl Gguf {
    pub(super) fn weights(&self) -> impl Iterator<Item = (&String, &GgmlState)> {
        self.weights.iter()
    }
}

impl GgmlState {
    /// The weight of `bytes`, with its rows in the order of Transformers.
    pub(super) fn weight(&self, bytes: Vec<u8>) -> Result<Ggml> {
        let [rows, cols] = self.shape;
        let Some(heads) = self.interleaved else {
            return Ok(Ggml::new(self.shape, self.kind, bytes)?);
        };
        let (row_bytes, width) = (self.kind.bytes(cols), rows / heads);
        let half = width / HALVES;
        let mut ordered = Vec::with_capacity(bytes.len());
        for row in 0..rows {
            let (head, within) = (row / width, row % width);
            let from = head * width + within % half * HALVES + within / half;
            ordered.extend_from_slice(&bytes[from * row_bytes..(from + 1) * row_bytes]);
        }
        Ok(Ggml::new(self.shape, self.kind, ordered)?)
    }
}
