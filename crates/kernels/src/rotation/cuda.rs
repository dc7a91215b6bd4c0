#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::{MOST_TERMS, Map, Source};
use crate::cuda::rows::count;
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{DType, Device, Result, Tensor, View, ViewMut};
use std::sync::Arc;

pub(crate) static MODULE: Module = Module {
    name: "rotation",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 256;

/// `struct Rotation` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Rotation {
    parameters: u64,
    rotations: u64,
    d_parameters: u64,
    scratch: u64,
    n: u32,
    each: u32,
    square: u32,
    terms: u32,
    factors: [f64; MOST_TERMS],
}

impl Rotation {
    fn new(rotations: View<'_>, parameters: View<'_>, source: Source, map: Map<'_>) -> Self {
        let mut factors = [0.0; MOST_TERMS];
        // No term at all is one of nothing.
        let terms = match map {
            Map::Cayley => 0,
            Map::Series(of) => {
                factors[..of.len()].copy_from_slice(of);
                of.len().max(1)
            }
        };
        Self {
            parameters: parameters.ptr(),
            rotations: rotations.ptr(),
            d_parameters: 0,
            scratch: 0,
            n: count(rotations.cols()),
            each: count(parameters.cols()),
            square: u32::from(source == Source::Square),
            terms: count(terms),
            factors,
        }
    }

    fn launch(mut self, device: &Arc<CudaDevice>, kernel: &str, rows: usize) -> Result<()> {
        let n = self.n as usize;
        // As f64, of which each takes two f32.
        let scratch = Tensor::temporary(
            &Device::Cuda(Arc::clone(device)),
            DType::F32,
            rows / n,
            2 * (4 * n * n + 2 * n),
        );
        self.scratch = scratch.view().ptr();
        let grid = Grid::new(count(rows / n), THREADS);
        device.launch(&MODULE, kernel, grid, &self)
    }
}

pub(super) fn forward(
    device: &Arc<CudaDevice>,
    rotations: ViewMut<'_>,
    parameters: View<'_>,
    source: Source,
    map: Map<'_>,
) -> Result<()> {
    let rows = rotations.rows();
    let params = Rotation::new(rotations.as_view(), parameters, source, map);
    params.launch(device, "rotation_forward", rows)
}

pub(super) fn add_gradient(
    device: &Arc<CudaDevice>,
    d_parameters: ViewMut<'_>,
    d: View<'_>,
    parameters: View<'_>,
    source: Source,
    map: Map<'_>,
) -> Result<()> {
    let params = Rotation {
        d_parameters: d_parameters.as_view().ptr(),
        ..Rotation::new(d, parameters, source, map)
    };
    params.launch(device, "rotation_gradient", d.rows())
}

/// `struct Shorten` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Shorten {
    vectors: u64,
    limit: f64,
    cols: u32,
    unused: u32,
}

pub(super) fn shorten(device: &CudaDevice, vectors: ViewMut<'_>, limit: f64) -> Result<()> {
    let [rows, cols] = vectors.shape();
    let params = Shorten {
        vectors: vectors.as_view().ptr(),
        limit,
        cols: count(cols),
        unused: 0,
    };
    let grid = Grid::new(count(rows), THREADS);
    device.launch(&MODULE, "rotation_shorten", grid, &params)
}
