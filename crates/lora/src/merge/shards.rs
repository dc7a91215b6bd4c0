//! One file of the checkpoint at a time.

use super::plan::{Change, Plan};
use super::{MergeDType, MergedTensor};
use ferrotune_core::io::{self, FileDType, SafetensorsFile, TensorData};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{View, ViewMut, matmul};
use half::{bf16, f16};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// What became of one file.
pub(super) struct Written {
    pub(super) file_name: String,
    pub(super) bytes: u64,
    /// Of every tensor in it.
    pub(super) names: Vec<String>,
    pub(super) tensors: Vec<MergedTensor>,
}

/// Writes the merged counterpart of one file into `directory`, under the same name.
pub(super) fn merge_file(
    file: &SafetensorsFile,
    plan: &Plan,
    dtype: MergeDType,
    directory: &Path,
) -> Result<Written> {
    let file_name = file
        .path()
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::model(file.path(), "the file's name is not valid UTF-8"))?
        .to_owned();
    let mut written = Written {
        file_name,
        bytes: 0,
        names: Vec::new(),
        tensors: Vec::new(),
    };
    let mut tensors = BTreeMap::new();
    for (name, source) in outputs(file, plan) {
        let data = match plan.changes.get(name) {
            None => unchanged(file, source, dtype)?,
            Some(changes) => {
                let (data, merged) = merged(file, source, name, changes, dtype)?;
                written.tensors.push(merged);
                data
            }
        };
        written.bytes += data.bytes.len() as u64;
        written.names.push(name.to_owned());
        tensors.insert(name.to_owned(), data);
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    io::write_safetensors(&directory.join(&written.file_name), &tensors, &metadata)?;
    Ok(written)
}

/// What the plan changes of one file, nothing written.
pub(super) fn changes_of_file(file: &SafetensorsFile, plan: &Plan) -> Result<Vec<MergedTensor>> {
    let mut found = Vec::new();
    for (name, source) in outputs(file, plan) {
        if let Some(changes) = plan.changes.get(name) {
            // In f32 nothing overflows that a change leaves finite.
            let merged = merged(file, source, name, changes, MergeDType::Float32)?;
            found.push(merged.1);
        }
    }
    Ok(found)
}

/// Tensors of the counterpart of a file, each with the one it starts from.
fn outputs<'a>(
    file: &'a SafetensorsFile,
    plan: &'a Plan,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    let is_new = |name: &str| plan.copies.contains_key(name);
    let kept = file.names().filter(move |n| !is_new(n) && !plan.drops(n));
    let new = plan.copies.iter();
    let new = new.filter(|(_, source)| file.meta(source).is_some());
    let new = new.map(|(name, source)| (name.as_str(), source.as_str()));
    kept.map(|name| (name, name)).chain(new)
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
fn meta(file: &SafetensorsFile, name: &str) -> Result<(FileDType, Vec<usize>)> {
    file.meta(name)
        .map(|meta| (meta.dtype, meta.shape.clone()))
        .ok_or_else(|| Error::model(file.path(), format!("`{name}` is missing")))
}

fn unchanged(file: &SafetensorsFile, name: &str, dtype: MergeDType) -> Result<TensorData<'static>> {
    let (from, shape) = meta(file, name)?;
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
    Ok(TensorData {
        dtype: to,
        shape,
        bytes: Cow::Owned(encode(&values, to)),
    })
}

/// Tensor `name`, made of `source` by `changes`.
fn merged(
    file: &SafetensorsFile,
    source: &str,
    name: &str,
    changes: &[Change],
    dtype: MergeDType,
) -> Result<(TensorData<'static>, MergedTensor)> {
    let (from, shape) = meta(file, source)?;
    if !is_float(from) {
        return Err(Error::model(
            file.path(),
            format!(
                "`{source}` is {from:?}, expected F32, F16 or BF16: merge into the unquantised base"
            ),
        ));
    }
    let to = output_dtype(from, dtype);
    let old = file.read_f32(source)?;
    let mut weight = old.clone();
    let delta = apply(changes, &shape, &mut weight)?;
    let (lost, norm) = add_rounded(&old, &mut weight, &delta, to);
    if let Some(at) = weight.iter().position(|value| !value.is_finite()) {
        return Err(Error::Numeric {
            message: format!(
                "merging `{name}` gives {} at element {at} as {to:?}; choose float32 or bfloat16 \
                 as output dtype, or check base and adapter for such values",
                weight[at]
            ),
        });
    }
    let tensor = MergedTensor {
        name: name.to_owned(),
        delta_norm: norm.sqrt(),
        base_norm: old
            .iter()
            .map(|w| f64::from(*w).powi(2))
            .sum::<f64>()
            .sqrt(),
        relative_error: if norm == 0.0 {
            0.0
        } else {
            (lost / norm).sqrt()
        },
    };
    let data = TensorData {
        dtype: to,
        shape,
        bytes: Cow::Owned(encode(&weight, to)),
    };
    Ok((data, tensor))
}

/// Puts what replaces values into `weight`, and returns what is to be added.
fn apply(changes: &[Change], shape: &[usize], weight: &mut [f32]) -> Result<Vec<f32>> {
    let columns = shape.last().copied().unwrap_or(1);
    let mut delta = vec![0.0_f32; weight.len()];
    for change in changes {
        match change {
            Change::Replace(values) => weight.copy_from_slice(values),
            Change::Rows { indices, values } => {
                for (&row, values) in indices.iter().zip(values.chunks(columns)) {
                    let at = row as usize * columns;
                    weight[at..at + columns].copy_from_slice(values);
                }
            }
            Change::Method(method) => method.apply(weight)?,
            Change::Vector { values, scale } => {
                let sums = delta.iter_mut().zip(values);
                sums.for_each(|(sum, value)| *sum += scale * value);
            }
            Change::LowRank {
                a,
                b,
                rank,
                scale,
                transposed: true,
            } => {
                let inputs = weight.len() / columns.max(1);
                let b_transposed: Vec<f32> = (0..rank * columns)
                    .map(|i| b[i % columns * rank + i / columns])
                    .collect();
                matmul::tn(
                    ViewMut::from_f32(&mut delta, inputs, columns),
                    1.0,
                    *scale,
                    View::from_f32(a, *rank, inputs),
                    View::from_f32(&b_transposed, *rank, columns),
                )?;
            }
            Change::LowRank {
                a, b, rank, scale, ..
            } => {
                let rows = weight.len() / columns.max(1);
                matmul::nn(
                    ViewMut::from_f32(&mut delta, rows, columns),
                    1.0,
                    *scale,
                    View::from_f32(b, rows, *rank),
                    View::from_f32(a, *rank, columns),
                )?;
            }
        }
    }
    Ok(delta)
}

/// Elements whose squares are summed together: fixed, so that the sums do not depend on the number
/// of threads.
const CHUNK: usize = 1 << 16;

/// `weight = round(weight + delta)`; the squared norms of what rounding lost of the change from `old`,
/// and of that change.
fn add_rounded(old: &[f32], weight: &mut [f32], delta: &[f32], dtype: FileDType) -> (f64, f64) {
    let partial: Vec<(f64, f64)> = weight
        .par_chunks_mut(CHUNK)
        .zip(delta.par_chunks(CHUNK))
        .zip(old.par_chunks(CHUNK))
        .map(|((weight, delta), old)| {
            let (mut lost, mut norm) = (0.0_f64, 0.0_f64);
            for ((w, d), old) in weight.iter_mut().zip(delta).zip(old) {
                let new = round(*w + d, dtype);
                let wanted = f64::from(*w) - f64::from(*old) + f64::from(*d);
                lost += (f64::from(new) - f64::from(*old) - wanted).powi(2);
                norm += wanted.powi(2);
                *w = new;
            }
            (lost, norm)
        })
        .collect();
    partial
        .into_iter()
        .fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
}

/// Rounds to nearest even; types other than the two short floats do not round.
pub(crate) fn round(value: f32, dtype: FileDType) -> f32 {
    match dtype {
        FileDType::BF16 => bf16::from_f32(value).to_f32(),
        FileDType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The bytes of a file, rounded to nearest even. Only called for the three floats.
fn encode(values: &[f32], dtype: FileDType) -> Vec<u8> {
    match dtype {
        FileDType::BF16 => {
            let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            bytemuck::cast_slice(&rounded).to_vec()
        }
        FileDType::F16 => {
            let rounded: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            bytemuck::cast_slice(&rounded).to_vec()
        }
        _ => bytemuck::cast_slice(values).to_vec(),
    }
}
