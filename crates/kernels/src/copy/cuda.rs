#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::transfer::rectangle;
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Module, convert};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "copy",
    source: include_str!("kernel.cu"),
};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct FillParams {
    to: Matrix,
    rows: u32,
    cols: u32,
    value: f32,
    unused: u32,
}

pub(super) fn fill(device: &CudaDevice, to: ViewMut<'_>, value: f32) -> Result<()> {
    let [rows, cols] = to.shape();
    if value.to_bits() == 0 && to.pitch() == cols {
        return device.fill_zero(to.ptr(), rows * cols * to.dtype().bytes());
    }
    let params = FillParams {
        to: Matrix::of(to.as_view()),
        rows: count(rows),
        cols: count(cols),
        value,
        unused: 0,
    };
    let access = Access::of(&[params.to], &[], &[cols]);
    let kernel = format!("fill_{}", access.suffix());
    device.launch(&MODULE, &kernel, access.elements(rows, cols), &params)
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CopyParams {
    from: Matrix,
    to: Matrix,
    rows: u32,
    cols: u32,
}

/// Copies within `device`.
pub(super) fn copy(device: &CudaDevice, to: ViewMut<'_>, from: View<'_>) -> Result<()> {
    let [rows, cols] = from.shape();
    if to.dtype() == from.dtype() {
        return device.copy_2d(to.ptr(), from.ptr(), rectangle(to.as_view(), from));
    }
    let params = CopyParams {
        from: Matrix::of(from),
        to: Matrix::of(to.as_view()),
        rows: count(rows),
        cols: count(cols),
    };
    let copy = convert::Copy::of(&params.from, &params.to, cols);
    let kernel = format!("copy_{}", copy.suffix());
    device.launch(&MODULE, &kernel, copy.elements(rows, cols), &params)
}
