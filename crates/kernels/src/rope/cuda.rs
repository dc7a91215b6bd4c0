#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Direction;
use crate::cuda::rows::{Access, Matrix, count, element_grid};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "rope",
    source: include_str!("kernel.cu"),
};

/// `struct Rope` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    x: Matrix,
    cos: u64,
    sin: u64,
    rows: u32,
    heads: u32,
    head_dim: u32,
    half: u32,
    sign: f32,
    unused: u32,
}

/// `cos` and `sin` have their rows back to back.
pub(super) fn apply(
    device: &CudaDevice,
    x: ViewMut<'_>,
    head_dim: usize,
    cos: View<'_>,
    sin: View<'_>,
    direction: Direction,
) -> Result<()> {
    let ([rows, cols], half) = (x.shape(), cos.cols());
    let heads = cols / head_dim;
    let params = Params {
        x: Matrix::of(x.as_view()),
        cos: cos.ptr(),
        sin: sin.ptr(),
        rows: count(rows),
        heads: count(heads),
        head_dim: count(head_dim),
        half: count(half),
        sign: match direction {
            Direction::Forward => 1.0,
            Direction::Backward => -1.0,
        },
        unused: 0,
    };
    let access = Access::of(&[params.x], &[cos.ptr(), sin.ptr()], &[head_dim, half]);
    let grid = element_grid(rows, access.groups(heads * half));
    let kernel = format!("rope_{}", access.suffix());
    device.launch(&MODULE, &kernel, grid, &params)
}
