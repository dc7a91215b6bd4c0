#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Activation;
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "gated_activation",
    source: include_str!("kernel.cu"),
};

/// `struct Gated` of the kernels: `out` is `d_out` in the backward pass.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    gate_up: Matrix,
    out: Matrix,
    rows: u32,
    cols: u32,
}

pub(super) fn forward(
    device: &CudaDevice,
    activation: Activation,
    gate_up: View<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    launch(device, "forward", activation, gate_up, out.as_view())
}

pub(super) fn backward_in_place(
    device: &CudaDevice,
    activation: Activation,
    gate_up: ViewMut<'_>,
    d_out: View<'_>,
) -> Result<()> {
    let gate_up = gate_up.as_view();
    launch(device, "backward_in_place", activation, gate_up, d_out)
}

fn launch(
    device: &CudaDevice,
    pass: &str,
    activation: Activation,
    gate_up: View<'_>,
    out: View<'_>,
) -> Result<()> {
    let [rows, cols] = out.shape();
    let params = Params {
        gate_up: Matrix::of(gate_up),
        out: Matrix::of(out),
        rows: count(rows),
        cols: count(cols),
    };
    let access = Access::of(&[params.gate_up, params.out], &[], &[cols]);
    let activation = match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_tanh",
    };
    let kernel = format!("gated_{activation}_{pass}_{}", access.suffix());
    device.launch(&MODULE, &kernel, access.elements(rows, cols), &params)
}
