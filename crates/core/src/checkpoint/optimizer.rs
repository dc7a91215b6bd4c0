//! `optimizer.safetensors`: the moments of AdamW and what a method keeps beside them, bit by bit.

use crate::io::{FileDType, SafetensorsFile, TensorData, write_safetensors};
use crate::params::{FlatBuffer, Segment};
use crate::{Error, Result};
use ferrotune_kernels::ViewMut;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Name of the file in a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// Writes `moments` (name and buffer, all of one layout) as `MOMENT.NAME`, f32, for each trainable tensor,
/// and the step counter as metadata. AdamW's are called `exp_avg` and `exp_avg_sq`, as PyTorch has them.
///
/// # Errors
/// [`Error::Write`].
pub fn write_optimizer(path: &Path, moments: &[(&str, &FlatBuffer)], step: u64) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (moment, buffer) in moments {
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
pub fn read_optimizer(path: &Path, moments: &mut [(&str, FlatBuffer)]) -> Result<u64> {
    let file = SafetensorsFile::open(path).map_err(of_checkpoint)?;
    let step = file.metadata().get("step").and_then(|s| s.parse().ok());
    let Some(step) = step else {
        return Err(mismatch(path, "has no step counter in its metadata"));
    };
    let mut expected = 0;
    for (moment, buffer) in moments.iter() {
        for (_, segment) in buffer.layout().by_name() {
            check(&file, &format!("{moment}.{}", segment.spec.name), segment)?;
            expected += 1;
        }
    }
    if file.names().count() != expected {
        return Err(mismatch(path, &foreign(&file, moments)));
    }
    for (moment, buffer) in moments {
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
fn foreign(file: &SafetensorsFile, moments: &[(&str, FlatBuffer)]) -> String {
    let trained = |name: &str| {
        moments.iter().any(|(moment, buffer)| {
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
            "{defect}; expected the moments of every trainable tensor and nothing else: resume with \
             the adapter configuration of the checkpoint"
        ),
    )
}

/// Here a broken or missing weights file is a broken checkpoint.
fn of_checkpoint(error: Error) -> Error {
    match error {
        Error::Model { path, message } => Error::Checkpoint { path, message },
        Error::Read { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::checkpoint(
                path,
                "is missing; use an older checkpoint, or begin anew with overwrite_output_dir: true",
            )
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{ParamLayout, ParamLayoutBuilder, ParamSpec};
    use std::borrow::Cow;

    fn message(result: Result<u64>) -> String {
        let error = result.expect_err("does not fit");
        assert!(matches!(error, Error::Checkpoint { .. }), "{error:?}");
        error.to_string()
    }

    type Specs<'a> = &'a [(&'a str, &'a [usize])];

    fn layout(specs: Specs<'_>) -> Arc<ParamLayout> {
        let mut builder = ParamLayoutBuilder::new();
        for (order, (name, shape)) in specs.iter().enumerate() {
            builder.add(ParamSpec::new(*name, *shape, order));
        }
        builder.build().expect("unique names")
    }

    /// Bit patterns that a lossy way would change: NaN payloads, negative zero, subnormals.
    fn moments(layout: &Arc<ParamLayout>, salt: u32) -> FlatBuffer {
        let mut buffer = FlatBuffer::zeros(layout);
        let ids: Vec<_> = layout.by_name().map(|(id, _)| id).collect();
        for id in ids {
            for (i, v) in buffer.get_mut(id).iter_mut().enumerate() {
                *v = f32::from_bits((i as u32).wrapping_mul(0x9e37_79b9).wrapping_add(salt));
            }
        }
        buffer
    }

    fn empty(layout: &Arc<ParamLayout>) -> [(&'static str, FlatBuffer); 2] {
        ["exp_avg", "exp_avg_sq"].map(|name| (name, FlatBuffer::zeros(layout)))
    }

    fn bits(buffer: &FlatBuffer) -> Vec<u32> {
        buffer.as_slice().iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn moments_come_back_bit_by_bit_whatever_the_physical_order() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(OPTIMIZER);
        let layout = layout(&[
            ("q.lora_A", &[8, 33]),
            ("q.lora_B", &[5, 8]),
            ("scale", &[3]),
        ]);
        let (m, v) = (moments(&layout, 0x7fa0_0000), moments(&layout, 0x8000_0001));
        write_optimizer(&path, &[("exp_avg", &m), ("exp_avg_sq", &v)], 12).expect("writable");
        let file = SafetensorsFile::open(&path).expect("sound");
        assert_eq!(
            file.meta("exp_avg_sq.q.lora_A").expect("there").shape,
            [8, 33]
        );
        let mut read = empty(&layout);
        assert_eq!(read_optimizer(&path, &mut read).expect("whole"), 12);
        assert_eq!([bits(&m), bits(&v)], [bits(&read[0].1), bits(&read[1].1)]);
    }

    #[test]
    fn moments_of_other_tensors_are_refused_both_ways() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(OPTIMIZER);
        let ab = layout(&[("a", &[2, 3]), ("b", &[4])]);
        let (m, v) = (moments(&ab, 1), moments(&ab, 2));
        write_optimizer(&path, &[("exp_avg", &m), ("exp_avg_sq", &v)], 1).expect("writable");
        let cases: [(Specs<'_>, &str); 4] = [
            (
                &[("a", &[2, 3])],
                "has `exp_avg.b`, which this run does not train",
            ),
            (
                &[("a", &[2, 3]), ("b", &[4]), ("c", &[1])],
                "has no `exp_avg.c`",
            ),
            (
                &[("a", &[3, 2]), ("b", &[4])],
                "`exp_avg.a` as F32 [2, 3], expected F32 [3, 2]",
            ),
            (
                &[("a", &[2, 3]), ("b", &[2, 2])],
                "`exp_avg.b` as F32 [4], expected F32 [2, 2]",
            ),
        ];
        for (specs, expected) in cases {
            let other = layout(specs);
            let mut read = empty(&other);
            let text = message(read_optimizer(&path, &mut read));
            assert!(text.contains(expected), "{text}");
            assert!(
                read.iter().all(|(_, b)| bits(b).iter().all(|&b| b == 0)),
                "untouched on error"
            );
        }
    }

    #[test]
    fn optimizer_files_that_lack_something_are_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(OPTIMIZER);
        let a = layout(&[("a", &[2])]);
        let mut read = empty(&a);
        let text = message(read_optimizer(&path, &mut read));
        assert!(text.contains("is missing"), "{text}");
        std::fs::write(&path, "garbage garbage").expect("writable");
        message(read_optimizer(&path, &mut read));
        let data = |dtype, bytes: usize| TensorData {
            dtype,
            shape: vec![2],
            bytes: Cow::Owned(vec![0; bytes]),
        };
        let step = BTreeMap::from([("step".to_owned(), "1".to_owned())]);
        let cases = [
            (FileDType::F32, 8, &BTreeMap::new(), "no step counter"),
            (FileDType::BF16, 4, &step, "BF16 [2], expected F32"),
        ];
        for (dtype, bytes, metadata, expected) in cases {
            let names = ["exp_avg.a", "exp_avg_sq.a"];
            let tensors = names
                .iter()
                .map(|n| ((*n).to_owned(), data(dtype, bytes)))
                .collect();
            write_safetensors(&path, &tensors, metadata).expect("writable");
            let text = message(read_optimizer(&path, &mut read));
            assert!(text.contains(expected), "{text}");
        }
    }
}
