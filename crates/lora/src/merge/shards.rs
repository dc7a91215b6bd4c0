//! One file of the checkpoint at a time.

use super::plan::Update;
use super::{MergeDType, MergedTensor};
use crate::lora::Factors;
use ferrotune_core::io::{self, FileDType, ModelFiles, SafetensorsFile, TensorData};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{View, ViewMut, matmul};
use half::{bf16, f16};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// The names of the tensors of each file, both sorted.
pub(super) fn by_file(base: &ModelFiles) -> BTreeMap<&Path, Vec<String>> {
    let mut files: BTreeMap<&Path, Vec<String>> = BTreeMap::new();
    for name in base.names() {
        files
            .entry(base.file_of(name))
            .or_default()
            .push(name.to_owned());
    }
    for names in files.values_mut() {
        names.sort_unstable();
    }
    files
}

/// What became of one file.
pub(super) struct Written {
    pub(super) file_name: String,
    pub(super) bytes: u64,
    pub(super) tensors: Vec<MergedTensor>,
}

/// Writes the merged counterpart of one file into `directory`, under the same name.
pub(super) fn merge_file(
    path: &Path,
    names: &[String],
    updates: &BTreeMap<String, Update>,
    dtype: MergeDType,
    directory: &Path,
) -> Result<Written> {
    let file = SafetensorsFile::open(path)?;
    let file_name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::model(path, "the file's name is not valid UTF-8"))?
        .to_owned();
    let mut written = Written {
        file_name,
        bytes: 0,
        tensors: Vec::new(),
    };
    let mut tensors = BTreeMap::new();
    for name in names {
        let data = match updates.get(name) {
            None => unchanged(&file, path, name, dtype)?,
            Some(update) => {
                let (data, merged) = merged(&file, path, name, update, dtype)?;
                written.tensors.push(merged);
                data
            }
        };
        written.bytes += data.bytes.len() as u64;
        tensors.insert(name.clone(), data);
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    io::write_safetensors(&directory.join(&written.file_name), &tensors, &metadata)?;
    Ok(written)
}

/// The floating-point types that take part in arithmetic.
fn is_float(dtype: FileDType) -> bool {
    matches!(dtype, FileDType::F32 | FileDType::F16 | FileDType::BF16)
}

fn output_dtype(base: FileDType, dtype: MergeDType) -> FileDType {
    match dtype {
        MergeDType::SameAsBase => base,
        MergeDType::Float32 => FileDType::F32,
        MergeDType::BFloat16 => FileDType::BF16,
    }
}

/// Dtype and shape of a tensor that is known to be in the file.
fn meta(file: &SafetensorsFile, path: &Path, name: &str) -> Result<(FileDType, Vec<usize>)> {
    file.meta(name)
        .map(|meta| (meta.dtype, meta.shape.clone()))
        .ok_or_else(|| Error::model(path, format!("`{name}` is missing")))
}

fn unchanged(
    file: &SafetensorsFile,
    path: &Path,
    name: &str,
    dtype: MergeDType,
) -> Result<TensorData<'static>> {
    let (from, shape) = meta(file, path, name)?;
    let to = output_dtype(from, dtype);
    if from == to || !is_float(from) {
        let bytes = Cow::Owned(file.read_bytes(name)?);
        return Ok(TensorData {
            dtype: from,
            shape,
            bytes,
        });
    }
    let values = file.read_f32(name)?;
    let bytes = encode(&values, to).bytes;
    Ok(TensorData {
        dtype: to,
        shape,
        bytes: Cow::Owned(bytes),
    })
}

fn merged(
    file: &SafetensorsFile,
    path: &Path,
    name: &str,
    update: &Update,
    dtype: MergeDType,
) -> Result<(TensorData<'static>, MergedTensor)> {
    let (from, shape) = meta(file, path, name)?;
    if !is_float(from) {
        return Err(Error::model(
            path,
            format!(
                "`{name}` is {from:?}, expected F32, F16 or BF16: merge into the unquantised base"
            ),
        ));
    }
    let to = output_dtype(from, dtype);
    let weight = file.read_f32(name)?;
    let delta = delta(update)?;
    let sum: Vec<f32> = weight.iter().zip(&delta).map(|(w, d)| w + d).collect();
    let Encoded { bytes, values } = encode(&sum, to);
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(Error::Numeric {
            message: format!(
                "merging `{name}` gives {} at element {at} as {to:?} (base {}, update {}); choose \
                 float32 or bfloat16 as output dtype, or check the adapter",
                values[at], weight[at], delta[at]
            ),
        });
    }
    let (mut lost, mut norm) = (0.0_f64, 0.0_f64);
    for ((new, old), delta) in values.iter().zip(&weight).zip(&delta) {
        let delta = f64::from(*delta);
        lost += (f64::from(*new) - f64::from(*old) - delta).powi(2);
        norm += delta.powi(2);
    }
    let tensor = MergedTensor {
        name: name.to_owned(),
        delta_norm: norm.sqrt(),
        relative_error: if norm == 0.0 {
            0.0
        } else {
            (lost / norm).sqrt()
        },
    };
    let data = TensorData {
        dtype: to,
        shape,
        bytes: Cow::Owned(bytes),
    };
    Ok((data, tensor))
}

/// `scale * B A`, `[out_features, in_features]`, in f32.
fn delta(update: &Update) -> Result<Vec<f32>> {
    let Factors {
        a,
        b,
        rank,
        in_features,
        out_features,
    } = &update.factors;
    let mut delta = vec![0.0_f32; out_features * in_features];
    matmul::nn(
        ViewMut::from_f32(&mut delta, *out_features, *in_features),
        0.0,
        update.scale,
        View::from_f32(b, *out_features, *rank),
        View::from_f32(a, *rank, *in_features),
    )?;
    Ok(delta)
}

/// Rounded values, as bytes of a file and widened again.
struct Encoded {
    bytes: Vec<u8>,
    values: Vec<f32>,
}

/// Rounds to nearest even. Types other than the three floats do not occur here and are kept f32.
fn encode(values: &[f32], dtype: FileDType) -> Encoded {
    match dtype {
        FileDType::BF16 => {
            let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            Encoded {
                bytes: bytemuck::cast_slice(&rounded).to_vec(),
                values: rounded.into_iter().map(bf16::to_f32).collect(),
            }
        }
        FileDType::F16 => {
            let rounded: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            Encoded {
                bytes: bytemuck::cast_slice(&rounded).to_vec(),
                values: rounded.into_iter().map(f16::to_f32).collect(),
            }
        }
        _ => Encoded {
            bytes: bytemuck::cast_slice(values).to_vec(),
            values: values.to_vec(),
        },
    }
}
