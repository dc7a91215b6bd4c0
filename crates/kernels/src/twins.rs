//! Compares a GPU operation with its CPU twin.

use crate::rng::Stream;
use crate::test_support::{assert_same_bits, cuda_device, normal};
use crate::{DType, Device, Indices, Tensor, View, ViewMut};

/// Columns before and after a matrix in a wider one: dense, rows on 16 bytes, rows on no multiple.
const MARGINS: [[usize; 2]; 3] = [[0, 0], [8, 16], [2, 3]];
/// What lies in the margins.
const OUTSIDE: f32 = 7.0;
/// Distance of f32 results, relative to the norm: other orders of summation.
const F32_TOLERANCE: f64 = 1e-5;

/// Where an operation under test runs, and how its arguments lie in memory.
pub(crate) struct Place {
    device: Device,
    margins: [usize; 2],
    /// Values are rounded to their dtype, but stored as f32: what exact arithmetic would give.
    exact: bool,
}

impl Place {
    /// Matrices of `device` whose rows are back to back.
    pub(crate) fn dense_on(device: Device) -> Self {
        Self {
            device,
            margins: MARGINS[0],
            exact: false,
        }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn matrix(&self, seed: u64, shape: [usize; 2], dtype: DType) -> Matrix {
        self.store(&normal(seed, shape[0] * shape[1]), shape, dtype)
    }

    /// [`Place::matrix`] of the same numbers in every run, whatever its seed; who calls it says why.
    pub(crate) fn fixed_matrix(&self, seed: u64, shape: [usize; 2], dtype: DType) -> Matrix {
        let mut stream = Stream::new(seed);
        let values: Vec<f32> = (0..shape[0] * shape[1])
            .map(|_| stream.normal() as f32)
            .collect();
        self.store(&values, shape, dtype)
    }

    /// The layouts in memory that tests try, on `device`.
    pub(crate) fn each_on(device: &Device) -> impl Iterator<Item = Self> {
        MARGINS.into_iter().map(|margins| Self {
            margins,
            ..Self::dense_on(device.clone())
        })
    }

    /// An output: NaN wherever the operation does not write.
    pub(crate) fn poisoned(&self, shape: [usize; 2], dtype: DType) -> Matrix {
        self.store(&vec![f32::NAN; shape[0] * shape[1]], shape, dtype)
    }

    /// An f32 matrix whose rows are back to back.
    pub(crate) fn dense(&self, seed: u64, shape: [usize; 2]) -> Tensor {
        let values = normal(seed, shape[0] * shape[1]);
        Tensor::from_f32(values, shape[0], shape[1]).to_device(&self.device)
    }

    pub(crate) fn indices(&self, values: &[u32]) -> Indices<'static> {
        Indices::new(values.to_vec(), &self.device)
    }

    /// A matrix of `values`.
    pub(crate) fn store(&self, values: &[f32], [rows, cols]: [usize; 2], dtype: DType) -> Matrix {
        let [before, after] = self.margins;
        let pitch = before + cols + after;
        let mut wide = vec![OUTSIDE; rows * pitch];
        for r in 0..rows {
            let start = r * pitch + before;
            wide[start..start + cols].copy_from_slice(&values[r * cols..(r + 1) * cols]);
        }
        let mut wide = Tensor::from_f32(wide, rows, pitch).to_dtype(dtype);
        if self.exact {
            wide = wide.to_dtype(DType::F32);
        }
        Matrix {
            wide: wide.to_device(&self.device),
            before,
            cols,
        }
    }
}

/// A range of columns of a wider matrix, whose other columns must not change.
pub(crate) struct Matrix {
    wide: Tensor,
    before: usize,
    cols: usize,
}

impl Matrix {
    pub(crate) fn view(&self) -> View<'_> {
        self.wide
            .view()
            .columns(self.before..self.before + self.cols)
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_> {
        let columns = self.before..self.before + self.cols;
        self.wide.view_mut().columns(columns)
    }

    pub(crate) fn values(&self) -> Vec<f32> {
        let wide = self.wide.to_f32_vec();
        let columns = self.before..self.before + self.cols;
        for row in wide.chunks(self.wide.cols().max(1)) {
            for (c, &value) in row.iter().enumerate() {
                let intact = columns.contains(&c) || value == OUTSIDE;
                assert!(intact, "a neighbouring column was written");
            }
        }
        self.view().to_f32_vec()
    }
}

/// Asserts that `run` gives the same on the CPU and on a GPU, for every layout in memory.
///
/// `run` returns its results with the dtype they were stored in. f32 must agree to 1e-5 of the norm;
/// bf16 may be at most twice as far from exact arithmetic as the CPU. Two runs give the same bits.
pub(crate) fn assert_cuda_matches(what: &str, run: impl Fn(&Place) -> Vec<(DType, Vec<f32>)>) {
    let device = Device::Cuda(cuda_device());
    for margins in MARGINS {
        let on = |device: &Device, exact| {
            run(&Place {
                device: device.clone(),
                margins,
                exact,
            })
        };
        let (cpu, exact) = (on(&Device::Cpu, false), on(&Device::Cpu, true));
        let (cuda, again) = (on(&device, false), on(&device, false));
        device.synchronize().expect("the GPU has not failed");
        assert_eq!(cpu.len(), cuda.len(), "{what}: results");
        for (i, (dtype, cuda)) in cuda.iter().enumerate() {
            let what = format!("{what}, margins {margins:?}, result {i}");
            assert_same_bits(cuda, &again[i].1, &what);
            assert_twin(cuda, &cpu[i].1, &exact[i].1, *dtype, &what);
        }
    }
}

#[track_caller]
fn assert_twin(cuda: &[f32], cpu: &[f32], exact: &[f32], dtype: DType, what: &str) {
    assert_eq!(cuda.len(), cpu.len(), "{what}: lengths");
    let (error, limit) = match dtype {
        DType::F32 => (distance(cuda, cpu), F32_TOLERANCE * norm(cpu)),
        DType::Bf16 => {
            let cpu_error = distance(cpu, exact);
            (distance(cuda, exact), 2.0 * cpu_error + 1e-6 * norm(exact))
        }
    };
    // Not `error > limit`: a NaN must fail.
    assert!(
        error <= limit,
        "{what}: off by {error:e}, at most {limit:e}"
    );
}

fn norm(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|&v| f64::from(v).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
    a.iter().zip(b).map(square).sum::<f64>().sqrt()
}
