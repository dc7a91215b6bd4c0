//! A digest of the weights of a model, cheap enough for the start of every command.

use super::convert::is_float;
use super::{ModelFiles, SafetensorsFile, is_buffer};
use crate::Result;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a block.
const BLOCK_BYTES: usize = 8 << 10;
/// Blocks of a tensor, the first at its start and the last at its end.
const BLOCKS: usize = 4;
/// What may stand before all names but that of the head.
const ROOTS: [&str; 2] = ["model.", "transformer."];
/// The head, and the tables that it may be a copy of, without root.
const HEAD: &str = "lm_head.weight";
const TABLES: [&str; 2] = ["embed_tokens.weight", "wte.weight"];

impl ModelFiles {
    /// BLAKE3, in hexadecimal, over names, dtypes, shapes and samples of the bytes of all tensors.
    ///
    /// The samples are 4 blocks of 8 KiB of each tensor, evenly spaced; a tensor of up to 32 KiB is read as a whole: 10
    /// MB of a model of 8 billion parameters. Training changes every value of a weight, so other weights of the same
    /// shapes are told apart; a change of single values between the samples is not seen. How tensors are spread over
    /// files does not matter, nor does what lies beside them: buffers that no model reads, the `model.` or
    /// `transformer.` before names, a head that is stored although it is the table of embeddings.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if a file shrank.
    pub fn weights_digest(&self) -> Result<String> {
        let tensors: Vec<_> = self
            .tensors()
            .filter(|(_, name)| !is_buffer(name))
            .collect();
        let sums = tensors.into_par_iter().map(|(file, name)| {
            let root = ROOTS.iter().find_map(|root| name.strip_prefix(root));
            Ok((root.unwrap_or(name), digest(file, name)?))
        });
        let mut sums: BTreeMap<&str, blake3::Hash> = sums.collect::<Result<_>>()?;
        let head = sums.get(HEAD);
        if head.is_some() && TABLES.iter().any(|table| sums.get(table) == head) {
            sums.remove(HEAD);
        }
        let mut hasher = blake3::Hasher::new();
        for (name, sum) in sums {
            hasher.update(format!("{name} ").as_bytes());
            hasher.update(sum.as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// What the weights are held in: the name of the format where they are codes, such as `nf4`, else the dtypes of
    /// their values, such as `BF16`.
    #[must_use]
    pub fn weights_format(&self) -> String {
        if let Some(name) = self.quantisation() {
            let nested = self.names().any(|name| name.ends_with(".nested_absmax"));
            return format!("{name}{}", if nested { " of nested scales" } else { "" });
        }
        let metas = self.tensors().filter_map(|(file, name)| file.meta(name));
        let floats = metas.filter(|meta| is_float(meta.dtype));
        let dtypes: BTreeSet<String> = floats.map(|meta| format!("{:?}", meta.dtype)).collect();
        dtypes.into_iter().collect::<Vec<_>>().join("+")
    }
}

/// Of one tensor.
fn digest(file: &SafetensorsFile, name: &str) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let meta = file.meta(name);
    hasher.update(format!("{:?} ", meta.map(|m| (m.dtype, &m.shape))).as_bytes());
    for (start, bytes) in blocks(file.bytes_of(name).unwrap_or(0)) {
        hasher.update(&file.read_bytes_at(name, start, bytes)?);
    }
    Ok(hasher.finalize())
}

/// Starts and lengths of what is read of a tensor of `bytes`.
fn blocks(bytes: usize) -> Vec<(usize, usize)> {
    if bytes <= BLOCKS * BLOCK_BYTES {
        return vec![(0, bytes)];
    }
    let gap = (bytes - BLOCK_BYTES) / (BLOCKS - 1);
    let mut blocks: Vec<_> = (0..BLOCKS - 1).map(|i| (i * gap, BLOCK_BYTES)).collect();
    blocks.push((bytes - BLOCK_BYTES, BLOCK_BYTES));
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{TensorData, write_safetensors};
    use std::collections::BTreeMap;
    use std::path::Path;

    #[test]
    fn blocks_are_in_order_apart_and_inside_the_tensor() {
        for length in [0, 1, 32 << 10, (32 << 10) + 1, 5 << 20, 7 << 30] {
            let mut end = 0;
            for (start, bytes) in blocks(length) {
                assert!(start >= end, "{start} before {end} of {length}");
                end = start + bytes;
            }
            assert_eq!(end, length);
        }
    }

    type Tensors = BTreeMap<String, Vec<f32>>;

    fn write(path: &Path, tensors: &Tensors) {
        let data = tensors
            .iter()
            .map(|(name, values)| (name.clone(), TensorData::from_f32(values, [values.len()])));
        write_safetensors(path, &data.collect(), &BTreeMap::new()).expect("writable");
    }

    fn digest_of(tensors: &Tensors) -> String {
        let directory = tempfile::tempdir().expect("temporary directory");
        write(&directory.path().join("model.safetensors"), tensors);
        let files = ModelFiles::open(directory.path()).expect("sound");
        files.weights_digest().expect("readable")
    }

    #[test]
    fn a_value_in_a_sample_a_name_and_a_shape_change_the_digest() {
        let small: Vec<f32> = (0..100).map(|i| i as f32).collect();
        let large: Vec<f32> = (0..40_000).map(|i| i as f32).collect();
        let tensors = Tensors::from([("a".into(), small), ("b".into(), large)]);
        let before = digest_of(&tensors);
        assert_eq!(before, digest_of(&tensors));
        for at in [0, 2047, 39_999] {
            let mut changed = tensors.clone();
            changed.get_mut("b").expect("there")[at] += 1.0;
            assert_ne!(before, digest_of(&changed), "value {at}");
        }
        let mut changed = tensors.clone();
        changed.get_mut("a").expect("there").push(0.0);
        assert_ne!(before, digest_of(&changed));
        let mut renamed = tensors;
        let values = renamed.remove("a").expect("there");
        renamed.insert("c".into(), values);
        assert_ne!(before, digest_of(&renamed));
    }

    #[test]
    fn what_no_model_reads_and_the_root_of_names_change_nothing() {
        let table: Vec<f32> = (0..9).map(|i| i as f32).collect();
        let tensors = Tensors::from([
            ("model.embed_tokens.weight".into(), table.clone()),
            ("model.layers.0.w".into(), vec![1.0]),
        ]);
        let before = digest_of(&tensors);
        let with = |name: &str, values: &[f32]| {
            let mut more = tensors.clone();
            more.insert(name.into(), values.to_vec());
            digest_of(&more)
        };
        assert_eq!(before, with("lm_head.weight", &table));
        assert_eq!(
            before,
            with("model.layers.0.self_attn.rotary_emb.inv_freq", &[0.5])
        );
        assert_ne!(before, with("lm_head.weight", &table[..8]));
        assert_ne!(before, with("model.layers.1.w", &[1.0]));
        let bare = tensors
            .iter()
            .map(|(name, values)| (name["model.".len()..].into(), values.clone()));
        assert_eq!(before, digest_of(&bare.collect()));
    }

    #[test]
    fn shards_of_the_same_tensors_have_the_same_digest() {
        let values = |from: u16| (from..from + 9).map(f32::from).collect();
        let [a, b] = [("a", 0), ("b", 9)].map(|(name, from)| (name.to_owned(), values(from)));
        let whole = digest_of(&Tensors::from([a.clone(), b.clone()]));
        let directory = tempfile::tempdir().expect("temporary directory");
        // The later name in the earlier file.
        for (file, tensor) in [("1.safetensors", b), ("2.safetensors", a)] {
            write(&directory.path().join(file), &Tensors::from([tensor]));
        }
        let index = r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#;
        let path = directory.path().join("model.safetensors.index.json");
        std::fs::write(path, index).expect("writable");
        let files = ModelFiles::open(directory.path()).expect("sound");
        assert_eq!(files.weights_digest().expect("readable"), whole);
    }
}
