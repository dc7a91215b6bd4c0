#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Indices, Result, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "noise",
    source: include_str!("kernel.cu"),
};

/// `struct Noise` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    x: Matrix,
    tokens: u64,
    scales: u64,
    rows: u32,
    cols: u32,
    key: [u32; 2],
}

pub(super) fn add(
    device: &CudaDevice,
    x: ViewMut<'_>,
    key: [u32; 2],
    tokens: &Indices<'_>,
    scales: &Indices<'_>,
) -> Result<()> {
    let [rows, cols] = x.as_view().shape();
    let params = Params {
        x: Matrix::of(x.as_view()),
        tokens: tokens.ptr(),
        scales: scales.ptr(),
        rows: count(rows),
        cols: count(cols),
        key,
    };
    let access = Access::of(&[params.x], &[], &[cols]);
    let kernel = format!("noise_add_{}", access.suffix());
    device.launch(&MODULE, &kernel, access.elements(rows, cols), &params)
}
