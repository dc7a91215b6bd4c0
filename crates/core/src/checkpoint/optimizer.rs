//! `optimizer.safetensors`: the moments of AdamW, bit by bit.

use crate::io::{FileDType, SafetensorsFile, TensorData, write_safetensors};
use crate::params::{FlatBuffer, Segment};
use crate::{Error, Result};
use ferrotune_kernels::ViewMut;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Name of the file in a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// Names of the moments, as PyTorch's optimizers call them.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// Writes first and second moments as `exp_avg.NAME` and `exp_avg_sq.NAME`, f32, one pair for each
/// trainable tensor, and the step counter as metadata.
///
/// # Errors
/// [`Error::Write`].
pub fn write_optimizer(
    path: &Path,
    exp_avg: &FlatBuffer,
    exp_avg_sq: &FlatBuffer,
    step: u64,
) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (moment, buffer) in MOMENTS.iter().zip([exp_avg, exp_avg_sq]) {
        for (id, segment) in buffer.layout().by_name() {
            let data = TensorData::from_f32(buffer.get(id), segment.spec.shape.clone());
            tensors.insert(format!("{moment}.{}", segment.spec.name), data);
        }
    }
    let metadata = BTreeMap::from([("step".to_owned(), step.to_string())]);
    write_safetensors(path, &tensors, &metadata)
}

/// Reads into buffers of the run's layout what [`write_optimizer`] wrote, and returns the step
/// counter.
///
/// # Errors
/// [`Error::Checkpoint`] if a trainable tensor has no moments in the file, the file has moments of
/// another, or a dtype or shape differs.
pub fn read_optimizer(
    path: &Path,
    exp_avg: &mut FlatBuffer,
    exp_avg_sq: &mut FlatBuffer,
) -> Result<u64> {
    let file = SafetensorsFile::open(path).map_err(of_checkpoint)?;
    let step = file.metadata().get("step").and_then(|s| s.parse().ok());
    let Some(step) = step else {
        return Err(mismatch(path, "has no step counter in its metadata"));
    };
    let mut expected = 0;
    for (moment, buffer) in MOMENTS.iter().zip([&*exp_avg, &*exp_avg_sq]) {
        for (_, segment) in buffer.layout().by_name() {
            check(&file, &format!("{moment}.{}", segment.spec.name), segment)?;
            expected += 1;
        }
    }
    if file.names().count() != expected {
        return Err(mismatch(path, &foreign(&file, exp_avg)));
    }
    for (moment, buffer) in MOMENTS.iter().zip([exp_avg, exp_avg_sq]) {
        let layout = Arc::clone(buffer.layout());
        for (id, segment) in layout.by_name() {
            let name = format!("{moment}.{}", segment.spec.name);
            let values = buffer.get_mut(id);
            let [rows, cols] = match file.meta(&name) {
                Some(meta) => meta.matrix_shape(),
                None => [1, values.len()],
            };
            file.read_rows_into(&name, ViewMut::from_f32(values, rows, cols))
                .map_err(of_checkpoint)?;
        }
    }
    Ok(step)
}

fn check(file: &SafetensorsFile, name: &str, segment: &Segment) -> Result<()> {
    let Some(meta) = file.meta(name) else {
        return Err(mismatch(file.path(), &format!("has no `{name}`")));
    };
    if meta.dtype == FileDType::F32 && meta.shape == segment.spec.shape {
        return Ok(());
    }
    let message = format!(
        "has `{name}` as {} {:?}, expected F32 {:?}",
        meta.dtype, meta.shape, segment.spec.shape
    );
    Err(mismatch(file.path(), &message))
}

/// The first tensor of the file that the run does not train.
fn foreign(file: &SafetensorsFile, buffer: &FlatBuffer) -> String {
    let trained = |name: &str| {
        MOMENTS.iter().any(|moment| {
            let parameter = name.strip_prefix(moment).and_then(|n| n.strip_prefix('.'));
            parameter.is_some_and(|p| buffer.layout().find(p).is_some())
        })
    };
    let name = file.names().find(|&n| !trained(n)).unwrap_or_default();
    format!("has `{name}`, which this run does not train")
}

fn mismatch(path: &Path, defect: &str) -> Error {
    Error::checkpoint(
        path,
        format!(
            "{defect}; expected both moments of every trainable tensor and nothing else: resume with \
             the adapter configuration of the checkpoint"
        ),
    )
}

/// Here a broken or missing weights file is a broken checkpoint.
fn of_checkpoint(error: Error) -> Error {
    match error {
        Error::Model { path, message } => Error::Checkpoint { path, message },
        Error::Read { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::checkpoint(path, "is missing; use an older checkpoint")
        }
        other => other,
    }
}
