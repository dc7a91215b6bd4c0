//! `optimizer.safetensors`: what the optimizer and a method keep from step to step, bit by bit.

use crate::io::{SafetensorsFile, write_safetensors};
use crate::trainer::StateTensors;
use crate::{Error, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Name of the file in a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// Writes `state`, `STATE.NAME` for each trainable tensor, and the step counter as metadata. States have
/// PyTorch's names where it has them, such as `exp_avg` and `exp_avg_sq` of AdamW.
///
/// # Errors
/// [`Error::Write`].
pub fn write_optimizer(path: &Path, state: &StateTensors<'_>, step: u64) -> Result<()> {
    let metadata = BTreeMap::from([("step".to_owned(), step.to_string())]);
    write_safetensors(path, state, &metadata)
}

/// Reads what [`write_optimizer`] wrote, which must have the names, dtypes and shapes of `expected`; returns it
/// with the step counter.
///
/// # Errors
/// [`Error::Checkpoint`] if a tensor is missing, there is one that is not expected, or a dtype or shape differs.
pub fn read_optimizer(
    path: &Path,
    expected: &StateTensors<'_>,
) -> Result<(u64, StateTensors<'static>)> {
    let file = SafetensorsFile::open(path).map_err(of_checkpoint)?;
    let step = file.metadata().get("step").and_then(|s| s.parse().ok());
    let Some(step) = step else {
        return Err(mismatch(path, "has no step counter in its metadata"));
    };
    for (name, tensor) in expected {
        let Some(meta) = file.meta(name) else {
            return Err(mismatch(path, &format!("has no `{name}`")));
        };
        if (meta.dtype, &meta.shape) != (tensor.dtype, &tensor.shape) {
            let message = format!(
                "has `{name}` as {} {:?}, expected {} {:?}",
                meta.dtype, meta.shape, tensor.dtype, tensor.shape
            );
            return Err(mismatch(path, &message));
        }
    }
    if let Some(other) = file.names().find(|name| !expected.contains_key(*name)) {
        let message = format!("has `{other}`, which this run does not train");
        return Err(mismatch(path, &message));
    }
    let mut state = BTreeMap::new();
    for (name, tensor) in expected {
        let bytes = file.read_bytes(name).map_err(of_checkpoint)?;
        let read = crate::io::TensorData {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            bytes: Cow::Owned(bytes),
        };
        state.insert(name.clone(), read);
    }
    Ok((step, state))
}

fn mismatch(path: &Path, defect: &str) -> Error {
    Error::checkpoint(
        path,
        format!(
            "{defect}; expected the state of every trainable tensor and nothing else: resume with \
             the optimizer and the adapter configuration of the checkpoint"
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
    use crate::io::{FileDType, TensorData};

    fn message(result: Result<(u64, StateTensors<'static>)>) -> String {
        let error = result.expect_err("does not fit");
        assert!(matches!(error, Error::Checkpoint { .. }), "{error:?}");
        error.to_string()
    }

    type Specs<'a> = &'a [(&'a str, &'a [usize])];

    /// Bit patterns that a lossy way would change: NaN payloads, negative zero, subnormals.
    fn state(specs: Specs<'_>) -> StateTensors<'static> {
        let mut tensors = BTreeMap::new();
        for (salt, state) in [0x7fa0_0000_u32, 0x8000_0001]
            .into_iter()
            .zip(["exp_avg", "exp_avg_sq"])
        {
            for (name, shape) in specs {
                let word = |i: u32| i.wrapping_mul(0x9e37_79b9).wrapping_add(salt).to_le_bytes();
                let len = shape.iter().product::<usize>() as u32;
                let data = TensorData {
                    dtype: FileDType::F32,
                    shape: shape.to_vec(),
                    bytes: Cow::Owned((0..len).flat_map(word).collect()),
                };
                tensors.insert(format!("{state}.{name}"), data);
            }
        }
        tensors
    }

    fn bytes<'a>(state: &'a StateTensors<'_>) -> Vec<(&'a str, &'a [u8])> {
        let each = state.iter();
        each.map(|(name, tensor)| (name.as_str(), &*tensor.bytes))
            .collect()
    }

    #[test]
    fn state_comes_back_bit_by_bit_in_its_own_types() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(OPTIMIZER);
        let mut written = state(&[
            ("q.lora_A", &[8, 33]),
            ("q.lora_B", &[5, 8]),
            ("scale", &[3]),
        ]);
        let indices = TensorData {
            dtype: FileDType::U8,
            shape: vec![3, 7],
            bytes: Cow::Owned((0..21).collect()),
        };
        written.insert("exp_avg.bytes".to_owned(), indices);
        write_optimizer(&path, &written, 12).expect("writable");
        let (step, read) = read_optimizer(&path, &written).expect("whole");
        assert_eq!((step, bytes(&read)), (12, bytes(&written)));
    }

    #[test]
    fn moments_of_other_tensors_are_refused_both_ways() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(OPTIMIZER);
        let ab = state(&[("a", &[2, 3]), ("b", &[4])]);
        write_optimizer(&path, &ab, 1).expect("writable");
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
            let text = message(read_optimizer(&path, &state(specs)));
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn optimizer_files_that_lack_something_are_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(OPTIMIZER);
        let a = state(&[("a", &[2])]);
        let text = message(read_optimizer(&path, &a));
        assert!(text.contains("is missing"), "{text}");
        std::fs::write(&path, "garbage garbage").expect("writable");
        message(read_optimizer(&path, &a));
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
            let text = message(read_optimizer(&path, &a));
            assert!(text.contains(expected), "{text}");
        }
    }
}
