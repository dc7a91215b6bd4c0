//! What the tests of the operations share.

use crate::cuda::CudaDevice;
pub(crate) use crate::host_cuda::device as cuda_device;
use crate::rng::{Stream, mix};
use crate::{DType, Tensor, View, ViewMut};
use candle_core::{Device, Var};
use std::sync::{Arc, OnceLock};
use std::{env, panic};

pub(crate) const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// Columns below, at and above the vector widths, odd on purpose.
pub(crate) const ODD_COLUMNS: [usize; 5] = [1, 3, 64, 123, 257];

/// Largest error, relative to the largest element, of a result stored as `dtype`.
///
/// f32: some roundings of 2^-24 each. bf16: the arithmetic is f32, so one rounding to 8 bits of
/// mantissa, at most 2^-9; twice that, because the largest element may itself be rounded.
pub(crate) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-6,
        DType::Bf16 => 2.0_f64.powi(-8),
    }
}

/// Environment variable with a number that all draws of the tests depend on; 0 and none are the same.
const SEED_VARIABLE: &str = "FERROTUNE_TEST_SEED";

/// That number. Every failure says it from then on.
fn seed_of_the_run() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let text = env::var(SEED_VARIABLE).unwrap_or_else(|_| "0".into());
        let seed = (text.parse())
            .unwrap_or_else(|_| panic!("{SEED_VARIABLE} is {text:?}, expected a whole number"));
        if seed != 0 {
            let others = panic::take_hook();
            panic::set_hook(Box::new(move |failure| {
                others(failure);
                eprintln!("repeat it with {SEED_VARIABLE}={seed}");
            }));
        }
        seed
    })
}

/// Random numbers, the same in every run of one [`SEED_VARIABLE`].
pub(crate) fn stream(seed: u64) -> Stream {
    match seed_of_the_run() {
        0 => Stream::new(seed),
        run => Stream::new(mix(run, seed)),
    }
}

/// Standard normal values.
pub(crate) fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut stream = stream(seed);
    (0..len).map(|_| stream.normal() as f32).collect()
}

/// A matrix that is a range of columns of a wider one, whose other columns must not change.
pub(crate) struct Pitched {
    wide: Tensor,
    cols: usize,
}

const BEFORE: usize = 2;
const AFTER: usize = 3;
const MARGIN: f32 = 7.0;

impl Pitched {
    pub(crate) fn new(values: &[f32], [rows, cols]: [usize; 2], dtype: DType) -> Self {
        let pitch = BEFORE + cols + AFTER;
        let mut wide = vec![MARGIN; rows * pitch];
        for r in 0..rows {
            let start = r * pitch + BEFORE;
            wide[start..start + cols].copy_from_slice(&values[r * cols..(r + 1) * cols]);
        }
        let wide = Tensor::from_f32(wide, rows, pitch).to_dtype(dtype);
        Self { wide, cols }
    }

    pub(crate) fn normal(seed: u64, shape: [usize; 2], dtype: DType) -> Self {
        Self::new(&normal(seed, shape[0] * shape[1]), shape, dtype)
    }

    pub(crate) fn zeros(shape: [usize; 2], dtype: DType) -> Self {
        Self::new(&vec![0.0; shape[0] * shape[1]], shape, dtype)
    }

    pub(crate) fn view(&self) -> View<'_> {
        self.wide.view().columns(BEFORE..BEFORE + self.cols)
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_> {
        self.wide.view_mut().columns(BEFORE..BEFORE + self.cols)
    }

    /// The values as stored, widened to f32.
    pub(crate) fn values(&self) -> Vec<f32> {
        for row in self.wide.to_f32_vec().chunks(BEFORE + self.cols + AFTER) {
            let inside = BEFORE..BEFORE + self.cols;
            for (c, &value) in row.iter().enumerate() {
                assert!(
                    inside.contains(&c) || value == MARGIN,
                    "a neighbouring column was written"
                );
            }
        }
        self.view().to_f32_vec()
    }
}

/// Asserts `max |got - want| <= tolerance * max |want|`.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f32], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let largest = want.iter().fold(0.0_f64, |m, &v| m.max(f64::from(v).abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - f64::from(want)).abs();
        // Not `error > ...`: a NaN must fail.
        assert!(
            error <= tolerance * largest,
            "{what}[{i}]: {got}, expected {want}"
        );
    }
}

#[track_caller]
pub(crate) fn assert_same_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(
            got.to_bits(),
            want.to_bits(),
            "{what}[{i}]: {got} and {want}"
        );
    }
}

/// Runs `body` on 1 and on 3 threads and asserts that the results have the same bits.
#[track_caller]
pub(crate) fn assert_same_on_any_thread_count(body: impl Fn() -> Vec<Vec<f32>> + Sync) {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a small thread pool starts");
        pool.install(&body)
    };
    for (i, (one, three)) in on(1).iter().zip(&on(3)).enumerate() {
        assert_same_bits(three, one, &format!("result {i}"));
    }
}

/// A leaf of the candle graph that serves as oracle.
pub(crate) fn var(values: &[f32], shape: &[usize]) -> Var {
    Var::from_slice(values, shape, &Device::Cpu).expect("the values fill the shape")
}

/// Gradients of `sum(output * seed)` with respect to `leaves`; every one must exist, because
/// candle's fused operations detach silently.
#[track_caller]
pub(crate) fn oracle_gradients(
    output: &candle_core::Tensor,
    seed: &[f32],
    leaves: &[&Var],
) -> Vec<Vec<f32>> {
    let seed = candle_core::Tensor::from_slice(seed, output.shape(), &Device::Cpu)
        .expect("the seed has the shape of the output");
    let sum = (output * seed)
        .and_then(|t| t.sum_all())
        .expect("the product is legal");
    let gradients = sum.backward().expect("every operation has a gradient");
    leaves
        .iter()
        .map(|leaf| flat(gradients.get(leaf).expect("the oracle has this gradient")))
        .collect()
}

/// The elements of a candle tensor in row order.
pub(crate) fn flat(tensor: &candle_core::Tensor) -> Vec<f32> {
    tensor
        .flatten_all()
        .and_then(|t| t.to_vec1())
        .expect("the tensor is f32")
}

/// A device of its own, for a test that breaks it.
pub(crate) fn new_cuda_device() -> Arc<CudaDevice> {
    // Opening the shared one sets where libraries and kernels are.
    CudaDevice::open(cuda_device().ordinal()).expect("a device opens twice")
}
