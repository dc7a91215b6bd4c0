//! Operations against those of PyTorch, recorded by `tests/fixtures/make_ops.py`: a file here for each.
//!
//! A case has an operation's inputs and upstream gradients, its results and gradients in double precision, and the
//! relative error of PyTorch's own operation in the dtype of the case against these. Ours may be [`MOST`] times as far
//! away in bf16, [`F32_TOLERANCE`] in f32. The files are part of the program, which so runs anywhere.
//! `-- golden_ops --nocapture` prints every error.

mod activation;
mod adamw;
mod attention;
mod bias;
mod dora;
mod embedding;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod lora;
mod qk_norm;
mod rms_norm;
mod rope;

use crate::test_support::cuda_device;
use crate::{DType, Device, Tensor};
use serde_json::Value;
use std::collections::HashMap;

/// How many times PyTorch's own error in bf16 is allowed: of the way of computing it that has the smallest.
const MOST: f64 = 2.0;
/// Of results in f32, relative to their norm: other orders of summation.
const F32_TOLERANCE: f64 = 1e-5;

/// A file of tests/fixtures/golden/ops.
#[derive(Clone, Copy)]
pub(super) struct Recorded {
    name: &'static str,
    bytes: &'static [u8],
}

/// The file `$name`, which ends with its dtype.
macro_rules! file {
    ($($name:literal),+) => {
        Recorded {
            name: concat!($($name),+),
            bytes: include_bytes!(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../tests/fixtures/golden/ops/",
                $($name),+,
                ".safetensors"
            )),
        }
    };
}

/// `CASES`, each in bf16 and f32, and the tests that the function `$run` holds them on the CPU and on the device of
/// the tests.
macro_rules! as_close_as_pytorch {
    ($run:ident: $($case:literal),+ $(,)?) => {
        pub(super) const CASES: &[Recorded] =
            &[$(file!($case, "_bf16"), file!($case, "_f32")),+];

        #[test]
        fn cpu_is_as_close_as_pytorch() {
            super::check(CASES, &crate::Device::Cpu, $run);
        }

        #[test]
        fn cuda_is_as_close_as_pytorch() {
            super::check(CASES, &super::gpu(), $run);
        }
    };
}
use {as_close_as_pytorch, file};

/// Results and gradients by name, as they were stored.
type Results = Vec<(&'static str, Vec<f32>)>;

fn gpu() -> Device {
    Device::Cuda(cuda_device())
}

/// What a file has.
pub(super) struct Case {
    name: &'static str,
    dtype: DType,
    tensors: HashMap<String, candle_core::Tensor>,
    settings: Value,
    /// Result to way of computing it to relative error.
    errors: Value,
}

impl Case {
    fn read(file: Recorded) -> Self {
        let Recorded { name, bytes } = file;
        let host = candle_core::Device::Cpu;
        let tensors =
            candle_core::safetensors::load_buffer(bytes, &host).expect("a safetensors file");
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
        let case = header["__metadata__"]["case"].as_str().expect("text");
        let mut case: Value = serde_json::from_str(case).expect("JSON");
        Self {
            name,
            dtype: if name.ends_with("_bf16") {
                DType::Bf16
            } else {
                DType::F32
            },
            tensors,
            settings: case["settings"].take(),
            errors: case["errors"].take(),
        }
    }

    fn number(&self, setting: &str) -> f32 {
        self.settings[setting].as_f64().expect("a number") as f32
    }

    fn count(&self, setting: &str) -> usize {
        self.settings[setting].as_u64().expect("a count") as usize
    }

    fn input(&self, name: &str) -> &candle_core::Tensor {
        &self.tensors[&format!("in.{name}")]
    }

    fn integers(&self, name: &str) -> Vec<i64> {
        self.input(name).to_vec1().expect("a vector of i64")
    }

    /// An input as f32, a vector being one row.
    fn f32(&self, name: &str, device: &Device) -> Tensor {
        let input = self.input(name);
        let (rows, cols) = input.dims2().unwrap_or((1, input.elem_count()));
        let values = input
            .to_dtype(candle_core::DType::F32)
            .and_then(|t| t.flatten_all()?.to_vec1());
        Tensor::from_f32(values.expect("floating point"), rows, cols).to_device(device)
    }

    /// An input in the dtype of the case.
    fn tensor(&self, name: &str, device: &Device) -> Tensor {
        self.f32(name, device).to_dtype(self.dtype)
    }

    /// An output in the dtype of the case: NaN where the operation does not write.
    fn output(&self, [rows, cols]: [usize; 2], device: &Device) -> Tensor {
        let mut output = Tensor::empty(device, self.dtype, rows, cols);
        output.view_mut().fill(f32::NAN);
        output
    }

    /// Asserts that a result is as close to the one in double precision as it has to be.
    fn judge(&self, result: &str, got: &[f32], device: &Device) {
        let want: Vec<f64> = self.tensors[&format!("out.{result}")]
            .flatten_all()
            .and_then(|t| t.to_vec1())
            .expect("f64");
        assert_eq!(got.len(), want.len(), "{}: length of {result}", self.name);
        let difference = got
            .iter()
            .zip(&want)
            .map(|(&got, want)| f64::from(got) - want);
        let error = norm(difference) / norm(want.iter().copied());
        let ways = self.errors[result].as_object().expect("errors of PyTorch");
        let pytorch = (ways.values().filter_map(Value::as_f64))
            .reduce(f64::min)
            .expect("a way of PyTorch's");
        let limit = match self.dtype {
            DType::F32 => F32_TOLERANCE,
            DType::Bf16 => MOST * pytorch,
        };
        let on = if device.is_cuda() { "cuda" } else { "cpu" };
        let what = format!(
            "{} {result} on {on}: {error:.3e}, PyTorch {pytorch:.3e}",
            self.name
        );
        eprintln!("{what}, ratio {:.2}", error / pytorch);
        // Not `error > limit`: a NaN must fail.
        assert!(error <= limit, "{what}, at most {limit:.3e}");
    }
}

/// An f32 sum to begin with.
fn zeros([rows, cols]: [usize; 2], device: &Device) -> Tensor {
    Tensor::zeros(DType::F32, rows, cols).to_device(device)
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

/// Runs every case and judges all of its results.
fn check(cases: &[Recorded], device: &Device, run: impl Fn(&Case, &Device) -> Results) {
    for &file in cases {
        let case = Case::read(file);
        let results = run(&case, device);
        let recorded = case.errors.as_object().expect("errors by result");
        let mut names = [
            recorded.keys().map(String::as_str).collect::<Vec<_>>(),
            results.iter().map(|(name, _)| *name).collect(),
        ];
        names.iter_mut().for_each(|names| names.sort_unstable());
        assert_eq!(
            names[0], names[1],
            "{}: results recorded, and given",
            case.name
        );
        for (result, got) in &results {
            case.judge(result, got, device);
        }
    }
}

#[test]
fn every_recorded_file_is_read() {
    let cases = [
        activation::CASES,
        adamw::CASES,
        attention::CASES,
        bias::CASES,
        dora::CASES,
        embedding::CASES,
        layer_norm::CASES,
        linear::CASES,
        linear_cross_entropy::CASES,
        lora::CASES,
        qk_norm::CASES,
        rms_norm::CASES,
        rope::CASES,
    ];
    let mut read: Vec<String> = (cases.concat().iter())
        .map(|file| format!("{}.safetensors", file.name))
        .collect();
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/golden/ops"
    );
    let entries = std::fs::read_dir(folder).expect("the folder of recorded operations");
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry
            .expect("readable")
            .file_name()
            .into_string()
            .expect("text")
    };
    let mut recorded: Vec<String> = entries.map(name).collect();
    read.sort();
    recorded.sort();
    assert_eq!(read, recorded);
}
