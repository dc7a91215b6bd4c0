#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "axpby",
    source: include_str!("kernel.cu"),
};

/// `struct Axpby` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Axpby {
    y: Matrix,
    x: Matrix,
    rows: u32,
    cols: u32,
    a: f32,
    b: f32,
}

/// `struct Scale` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Scale {
    y: Matrix,
    rows: u32,
    cols: u32,
    a: f32,
    unused: u32,
}

pub(super) fn add(device: &CudaDevice, a: f32, y: ViewMut<'_>, b: f32, x: View<'_>) -> Result<()> {
    let [rows, cols] = y.shape();
    let params = Axpby {
        y: Matrix::of(y.as_view()),
        x: Matrix::of(x),
        rows: count(rows),
        cols: count(cols),
        a,
        b,
    };
    let access = Access::of(&[params.y, params.x], &[], &[cols]);
    let kernel = format!("axpby_add_{}", access.suffix());
    device.launch(&MODULE, &kernel, access.elements(rows, cols), &params)
}

pub(super) fn scale(device: &CudaDevice, a: f32, y: ViewMut<'_>) -> Result<()> {
    let [rows, cols] = y.shape();
    let params = Scale {
        y: Matrix::of(y.as_view()),
        rows: count(rows),
        cols: count(cols),
        a,
        unused: 0,
    };
    let access = Access::of(&[params.y], &[], &[cols]);
    let kernel = format!("axpby_scale_{}", access.suffix());
    device.launch(&MODULE, &kernel, access.elements(rows, cols), &params)
}
