#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "bias",
    source: include_str!("kernel.cu"),
};

/// `struct Bias` of the kernels: the bias or its gradient.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    y: Matrix,
    bias: u64,
    rows: u32,
    cols: u32,
    scale: f32,
    unused: u32,
}

impl Params {
    fn new(y: View<'_>, scale: f32, bias: View<'_>) -> Self {
        Self {
            y: Matrix::of(y),
            bias: bias.ptr(),
            rows: count(y.rows()),
            cols: count(y.cols()),
            scale,
            unused: 0,
        }
    }
}

pub(super) fn add(device: &CudaDevice, y: ViewMut<'_>, scale: f32, bias: View<'_>) -> Result<()> {
    let params = Params::new(y.as_view(), scale, bias);
    let access = Access::of(&[params.y], &[params.bias], &[y.cols()]);
    let kernel = format!("bias_add_{}", access.suffix());
    device.launch(
        &MODULE,
        &kernel,
        access.elements(y.rows(), y.cols()),
        &params,
    )
}

pub(super) fn backward(
    device: &CudaDevice,
    dy: View<'_>,
    scale: f32,
    d_bias: ViewMut<'_>,
) -> Result<()> {
    let params = Params::new(dy, scale, d_bias.as_view());
    let kernel = format!("bias_backward_{}", params.y.suffix());
    device.launch(&MODULE, &kernel, column_sums(dy.cols()), &params)
}
