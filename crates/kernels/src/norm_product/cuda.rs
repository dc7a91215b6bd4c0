#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Factors;
use crate::cuda::rows::count;
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "norm_product",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 512;

/// `struct NormProduct` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct NormProduct {
    a: u64,
    b: u64,
    d_a: u64,
    d_b: u64,
    inverses: u64,
    rank: u32,
    inputs: u32,
    outputs: u32,
    least: f32,
}

impl NormProduct {
    fn new(inverses: View<'_>, of: Factors<'_>) -> Self {
        Self {
            a: of.a.ptr(),
            b: of.b.ptr(),
            d_a: 0,
            d_b: 0,
            inverses: inverses.ptr(),
            rank: count(of.a.rows()),
            inputs: count(of.a.cols()),
            outputs: count(of.b.rows()),
            least: of.least,
        }
    }

    fn launch(self, device: &CudaDevice, kernel: &str) -> Result<()> {
        device.launch(&MODULE, kernel, Grid::new(self.rank, THREADS), &self)
    }
}

pub(super) fn inverse(device: &CudaDevice, out: ViewMut<'_>, of: Factors<'_>) -> Result<()> {
    NormProduct::new(out.as_view(), of).launch(device, "norm_product_inverse")
}

pub(super) fn add_inverse_gradients(
    device: &CudaDevice,
    [d_a, d_b]: [ViewMut<'_>; 2],
    d: View<'_>,
    of: Factors<'_>,
) -> Result<()> {
    let params = NormProduct {
        d_a: d_a.as_view().ptr(),
        d_b: d_b.as_view().ptr(),
        ..NormProduct::new(d, of)
    };
    params.launch(device, "norm_product_inverse_gradients")
}
