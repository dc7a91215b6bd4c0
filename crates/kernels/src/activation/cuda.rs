use super::Activation;
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View};

pub(crate) static MODULE: Module = Module {
    name: "activation",
    source: include_str!("kernel.cu"),
};

/// `struct Params` of the kernels: `x` is gate and up where there is a gate; `out` is `d_out` in the
/// backward pass.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    x: Matrix,
    out: Matrix,
    rows: u32,
    cols: u32,
}

/// `kind` is `gated` or `plain`, `pass` is `forward` or `backward_in_place`.
pub(super) fn launch(
    device: &CudaDevice,
    kind: &str,
    pass: &str,
    activation: Activation,
    [x, out]: [View<'_>; 2],
) -> Result<()> {
    let [rows, cols] = out.shape();
    let params = Params {
        x: Matrix::of(x),
        out: Matrix::of(out),
        rows: count(rows),
        cols: count(cols),
    };
    let access = Access::of(&[params.x, params.out], &[], &[cols]);
    let activation = match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_tanh",
        Activation::QuickGelu => "quick_gelu",
        Activation::Relu => "relu",
    };
    let kernel = format!("{kind}_{activation}_{pass}_{}", access.suffix());
    device.launch(&MODULE, &kernel, access.elements(rows, cols), &params)
}
