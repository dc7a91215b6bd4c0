#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Order;
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "circulant",
    source: include_str!("kernel.cu"),
};

/// `struct Circulant` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Circulant {
    matrix: Matrix,
    kernel: u64,
    rows: u32,
    cols: u32,
    block: u32,
    reflected: u32,
    alpha: f32,
    unused: u32,
}

impl Circulant {
    fn new(matrix: View<'_>, kernel: View<'_>, alpha: f32, block: usize) -> Self {
        Self {
            matrix: Matrix::of(matrix),
            kernel: kernel.ptr(),
            rows: count(matrix.rows()),
            cols: count(matrix.cols()),
            block: count(block),
            reflected: 0,
            alpha,
            unused: 0,
        }
    }
}

pub(super) fn add(
    device: &CudaDevice,
    out: ViewMut<'_>,
    alpha: f32,
    kernel: View<'_>,
    block: usize,
    order: Order,
) -> Result<()> {
    let params = Circulant {
        reflected: u32::from(order == Order::Reflected),
        ..Circulant::new(out.as_view(), kernel, alpha, block)
    };
    let grid = Access::Any.elements(out.rows(), out.cols());
    device.launch(&MODULE, "circulant_add", grid, &params)
}

pub(super) fn add_gradient(
    device: &CudaDevice,
    d_kernel: ViewMut<'_>,
    alpha: f32,
    d: View<'_>,
    block: usize,
) -> Result<()> {
    let params = Circulant::new(d, d_kernel.as_view(), alpha, block);
    let grid = Access::Any.elements(d_kernel.rows(), d_kernel.cols());
    device.launch(&MODULE, "circulant_gradient", grid, &params)
}
