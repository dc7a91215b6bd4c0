#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::cpu::Mask;
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Indices, Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "dropout",
    source: include_str!("kernel.cu"),
};

/// `struct Dropout` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    x: Matrix,
    out: Matrix,
    tokens: u64,
    rows: u32,
    cols: u32,
    key: [u32; 2],
    threshold: u32,
    scale: f32,
}

/// Launches `forward` or `add_masked`.
pub(super) fn apply(
    device: &CudaDevice,
    kernel: &str,
    x: View<'_>,
    mask: Mask,
    tokens: &Indices<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    let [rows, cols] = x.shape();
    let (key, threshold, scale) = match mask {
        // Every word reaches a threshold of 0.
        Mask::Constant(factor) => ([0, 0], 0, factor),
        Mask::Random {
            key,
            threshold,
            scale,
        } => (key, threshold, scale),
    };
    let params = Params {
        x: Matrix::of(x),
        out: Matrix::of(out.as_view()),
        tokens: tokens.ptr(),
        rows: count(rows),
        cols: count(cols),
        key,
        threshold,
        scale,
    };
    let access = Access::of(&[params.x, params.out], &[], &[cols]);
    let kernel = format!("dropout_{kernel}_{}", access.suffix());
    device.launch(&MODULE, &kernel, access.elements(rows, cols), &params)
}
