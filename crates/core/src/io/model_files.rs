//! The weights of a model directory: one file, or shards and their index.

use super::gguf::{self, GgmlState, Gguf};
use super::json::UniqueMap;
use super::quantised::{self, QuantisedWeights, Stored};
use super::{FileDType, SafetensorsFile, TensorMeta, safe_file_name};
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use ferrotune_kernels::dequantise::{FourBitFormat, QuantFormat, Quantised};
use ferrotune_kernels::{DType, ViewMut};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// An index names each tensor once; this is room for 500,000 of them.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Endings of files that are, or may be, pickle.
const PICKLE: [&str; 6] = ["bin", "pt", "pth", "ckpt", "pkl", "pickle"];

/// The weights of a model directory.
#[derive(Debug)]
pub struct ModelFiles {
    pub(super) dir: PathBuf,
    shards: Vec<SafetensorsFile>,
    shard_of: BTreeMap<String, usize>,
    /// What a GGUF file says of its weights.
    gguf: Gguf,
    /// The weights that are codes.
    quantised: QuantisedWeights,
}

/// Whether a tensor of a checkpoint is a buffer that no model reads: frequencies that old ones keep, GPT-2's causal masks.
pub(crate) fn is_buffer(name: &str) -> bool {
    let buffers = ["rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];
    buffers.iter().any(|buffer| name.ends_with(buffer))
}

impl ModelFiles {
    /// Opens `model.safetensors`, or else the shards that `model.safetensors.index.json` names, or else the one
    /// GGUF file, and checks every header.
    ///
    /// # Errors
    /// [`Error::Model`] if there are no weights, only pickle, a shard is missing or unsound, the
    /// index names a file outside the directory or a tensor that its shard lacks, a tensor is in two
    /// shards, or the parts of a quantised weight do not fit together.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            return Err(Error::model(dir, "no such directory"));
        }
        if dir.join(SINGLE).exists() {
            let file = SafetensorsFile::open(dir.join(SINGLE))?;
            return Self::collect(dir, vec![file], Gguf::default());
        }
        if dir.join(INDEX).exists() {
            return Self::open_sharded(dir);
        }
        if let Some(path) = gguf::find(dir)? {
            let (file, gguf) = gguf::open(&path)?;
            return Self::collect(dir, vec![file], gguf);
        }
        Err(no_weights(dir))
    }

    fn open_sharded(dir: &Path) -> Result<Self> {
        let index = dir.join(INDEX);
        let weight_map = read_index(&index)?;
        let names: BTreeSet<&String> = weight_map.values().collect();
        let mut shards = Vec::with_capacity(names.len());
        for &name in &names {
            let safe = safe_file_name(name).map_err(|e| Error::model(&index, e))?;
            let path = dir.join(safe);
            if path.extension().is_none_or(|e| e != "safetensors") {
                return Err(Error::model(
                    &index,
                    format!("names the shard `{safe}`, expected a .safetensors file"),
                ));
            }
            if !path.exists() {
                return Err(Error::model(
                    &path,
                    format!("shard is missing, {INDEX} names it; was the download cut off?"),
                ));
            }
            shards.push(SafetensorsFile::open(path)?);
        }
        let files = Self::collect(dir, shards, Gguf::default())?;
        let shard_numbers: BTreeMap<&String, usize> = names
            .iter()
            .enumerate()
            .map(|(i, &name)| (name, i))
            .collect();
        for (tensor, shard) in &weight_map {
            files.check_indexed(tensor, shard, shard_numbers[shard])?;
        }
        Ok(files)
    }

    fn collect(dir: &Path, shards: Vec<SafetensorsFile>, gguf: Gguf) -> Result<Self> {
        let mut shard_of = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                if let Some(other) = shard_of.insert(name.to_owned(), i) {
                    let other: &SafetensorsFile = &shards[other];
                    return Err(Error::model(
                        shard.path(),
                        format!("tensor `{name}` is also in {}", other.path().display()),
                    ));
                }
            }
        }
        let mut files = Self {
            dir: dir.into(),
            shards,
            shard_of,
            gguf,
            quantised: QuantisedWeights::default(),
        };
        files.quantised = QuantisedWeights::find(&files, &quantised::settings(dir)?)?;
        Ok(files)
    }

    fn check_indexed(&self, tensor: &str, shard: &str, number: usize) -> Result<()> {
        let message = match self.shard_of.get(tensor) {
            Some(&found) if found == number => return Ok(()),
            Some(&found) => format!(
                "{INDEX} places tensor `{tensor}` here, but it is in {}",
                self.shards[found].path().display()
            ),
            None => format!("{INDEX} places tensor `{tensor}` here, but the shard lacks it"),
        };
        Err(Error::model(self.dir.join(shard), message))
    }

    /// Names of the tensors of all shards, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shard_of.keys().map(String::as_str)
    }

    /// The name here of the tensor that an architecture calls `name`. A model saved without its head, as
    /// the first GPT-2 was, lacks the first part of the path: `model.layers.0...` is `layers.0...`.
    #[must_use]
    pub fn own_name<'a>(&self, name: &'a str) -> &'a str {
        match name.split_once('.') {
            Some((first, rest)) if self.shard_of.contains_key(rest) && !self.has_part(first) => {
                rest
            }
            _ => name,
        }
    }

    /// Whether the path of a tensor begins with `first`.
    fn has_part(&self, first: &str) -> bool {
        let from = format!("{first}.");
        let next = self.shard_of.range(from.clone()..).next();
        next.is_some_and(|(name, _)| name.starts_with(&from))
    }

    /// Dtype and shape of a tensor.
    #[must_use]
    pub fn meta(&self, name: &str) -> Option<&TensorMeta> {
        let name = self.own_name(name);
        let shard = *self.shard_of.get(name)?;
        self.shards[shard].meta(name)
    }

    /// Names and shapes of the weights: one that is codes and its parts are one, with the shape of its
    /// values.
    #[must_use]
    pub fn weight_shapes(&self) -> BTreeMap<&str, &[usize]> {
        let values = self.names().filter(|name| !self.quantised.covers(name));
        let values = values.filter_map(|name| Some((name, self.meta(name)?.shape.as_slice())));
        values.chain(self.quantised.shapes()).collect()
    }

    /// The format of a weight that is held in 4 bits of bitsandbytes.
    #[must_use]
    pub fn four_bit_format(&self, name: &str) -> Option<FourBitFormat> {
        let stored = self.quantised.get(self.own_name(name));
        stored.and_then(Stored::four_bit_format)
    }

    /// The format of a weight that is held as codes, where values can be brought into it.
    #[must_use]
    pub fn quant_format(&self, name: &str) -> Option<QuantFormat> {
        let stored = self.quantised.get(self.own_name(name));
        stored.and_then(Stored::format)
    }

    /// Bytes that a weight takes in memory which is held as codes; `None` for a weight that is not.
    #[must_use]
    pub fn quantised_bytes(&self, name: &str) -> Option<usize> {
        let stored = self.quantised.get(self.own_name(name));
        stored.map(Stored::bytes)
    }

    /// What values are held in: bf16 if any are, else f32. Codes may be stored as numbers of any dtype.
    #[must_use]
    pub fn dtype(&self) -> DType {
        let is_bf16 = |name: &str| self.meta(name).is_some_and(|m| m.dtype == FileDType::BF16);
        let mut values = self
            .names()
            .filter(|name| self.quantised.get(name).is_none());
        match values.any(is_bf16) {
            true => DType::Bf16,
            false => DType::F32,
        }
    }

    /// The name of the format that weights are held in as codes; `None` if none is.
    #[must_use]
    pub fn quantisation(&self) -> Option<&'static str> {
        self.quantised.name()
    }

    /// Biases beside packed weights that are zero everywhere.
    ///
    /// # Errors
    /// [`Error::Model`] if a file shrank.
    pub(crate) fn zero_biases(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for weight in self.quantised.packed() {
            let bias = format!("{}.bias", weight.trim_end_matches(".weight"));
            if self.meta(&bias).is_some() && self.read_f32(&bias)?.iter().all(|v| *v == 0.0) {
                found.push(bias);
            }
        }
        Ok(found)
    }

    /// Reads a weight that is held as codes into host memory; `None` for a weight that is not.
    ///
    /// # Errors
    /// [`Error::Model`] if a file shrank, or holds what is no state of such a weight.
    pub fn read_quantised(&self, name: &str) -> Result<Option<Quantised>> {
        let name = self.own_name(name);
        let stored = self.quantised.get(name);
        stored.map(|stored| stored.read(self, name)).transpose()
    }

    /// The file that a tensor is in, or the directory if there is no such tensor.
    #[must_use]
    pub fn file_of(&self, name: &str) -> &Path {
        match self.shard_of.get(self.own_name(name)) {
            Some(&shard) => self.shards[shard].path(),
            None => &self.dir,
        }
    }

    /// The quantised weights of a GGUF file by name.
    pub(super) fn ggml_weights(&self) -> impl Iterator<Item = (&String, &GgmlState)> {
        self.gguf.weights()
    }

    /// The directory.
    pub(super) fn directory(&self) -> &Path {
        &self.dir
    }

    /// The files, sorted by name.
    #[must_use]
    pub fn shards(&self) -> &[SafetensorsFile] {
        &self.shards
    }

    /// Every tensor and the file it is in, sorted by name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&SafetensorsFile, &str)> {
        let shard_of = self.shard_of.iter();
        shard_of.map(|(name, shard)| (&self.shards[*shard], name.as_str()))
    }

    /// [`SafetensorsFile::read_rows_into`] of the shard that has the tensor.
    ///
    /// # Errors
    /// [`Error::Model`] as there.
    pub fn read_rows_into(&self, name: &str, dst: ViewMut<'_>) -> Result<()> {
        let name = self.own_name(name);
        self.shard(name)?.read_rows_into(name, dst)
    }

    /// [`SafetensorsFile::read_f32`] of the shard that has the tensor.
    ///
    /// # Errors
    /// [`Error::Model`] as there.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let name = self.own_name(name);
        self.shard(name)?.read_f32(name)
    }

    /// Refuses a head that is stored beside the embedding it is tied to and has other values. One that is not
    /// stored is the embedding's.
    ///
    /// # Errors
    /// [`Error::Model`] naming both: which of them the head is, is not said.
    pub fn require_tied(&self, head: &str, embedding: &str) -> Result<()> {
        let stored = |name: &str| Some((self.own_name(name).to_owned(), self.meta(name)?.clone()));
        let Some(((head, of_head), (embedding, of_embedding))) =
            stored(head).zip(stored(embedding))
        else {
            return Ok(());
        };
        let same = of_head.shape == of_embedding.shape
            && match of_head.dtype == of_embedding.dtype {
                true => self.read_bytes(&head)? == self.read_bytes(&embedding)?,
                false => self.read_f32(&head)? == self.read_f32(&embedding)?,
            };
        if same {
            return Ok(());
        }
        let message = format!(
            "`{head}` has other values than `{embedding}`, and config.json ties the two: Transformers 5 takes each \
             as it is stored, earlier ones `{embedding}` for both. Set tie_word_embeddings to false for the former, \
             take `{head}` out for the latter"
        );
        Err(Error::model(self.file_of(&head), message))
    }

    /// The bytes of a tensor of any dtype.
    pub(super) fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        self.shard(name)?.read_bytes(name)
    }

    /// Bytes of a tensor.
    pub(super) fn bytes_of(&self, name: &str) -> Option<usize> {
        self.shards[*self.shard_of.get(name)?].bytes_of(name)
    }

    fn shard(&self, name: &str) -> Result<&SafetensorsFile> {
        let shard = self.shard_of.get(name).ok_or_else(|| {
            Error::model(
                &self.dir,
                format!(
                    "no tensor `{name}` among {}{}",
                    self.shard_of.len(),
                    did_you_mean(name, self.names())
                ),
            )
        })?;
        Ok(&self.shards[*shard])
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let bytes = fs::metadata(path).map_err(Error::read(path))?.len();
    if bytes > MAX_INDEX_BYTES {
        return Err(Error::model(
            path,
            format!("has {bytes} bytes, expected at most {MAX_INDEX_BYTES}"),
        ));
    }
    let text = fs::read(path).map_err(Error::read(path))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::model(path, format!("is not a weight index: {e}")))?;
    if index.weight_map.0.is_empty() {
        return Err(Error::model(path, "`weight_map` is empty"));
    }
    Ok(index.weight_map.0)
}

/// The first file of `dir`, in order of names, whose ending says pickle.
#[must_use]
pub fn find_pickle(dir: &Path) -> Option<PathBuf> {
    let ends_like_pickle = |path: &PathBuf| {
        path.extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| PICKLE.contains(&e.to_lowercase().as_str()))
    };
    let entries = fs::read_dir(dir).ok()?;
    entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(ends_like_pickle)
        .min()
}

fn no_weights(dir: &Path) -> Error {
    if let Some(pickle) = find_pickle(dir) {
        return Error::model(
            pickle,
            format!(
                "pickle is never read, because reading it runs code; convert with safetensors \
                 (Transformers: `save_pretrained(..., safe_serialization=True)`) to get {SINGLE}"
            ),
        );
    }
    Error::model(
        dir,
        format!("no weights: expected {SINGLE}, {INDEX} and its shards, or one GGUF file"),
    )
}
