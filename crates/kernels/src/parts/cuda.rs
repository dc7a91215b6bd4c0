#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::{Blocks, Draws, Rows};
use crate::cuda::rows::count;
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{DType, Result, Tensor, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "parts",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 512;

/// `struct Parts` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Parts {
    step: u64,
    out: u64,
    swaps: u64,
    key: u64,
    rows: f64,
    module: f64,
    count: u32,
    scaled: u32,
    left_out: u32,
    groups: u32,
    group: u32,
    unused: u32,
}

impl Parts {
    fn new(out: View<'_>, draws: Draws<'_>) -> Self {
        let before = (draws.steps.len() - 1) * size_of::<u32>();
        Self {
            step: draws.steps.ptr() + before as u64,
            out: out.ptr(),
            key: draws.key,
            count: count(out.rows()),
            ..bytemuck::Zeroable::zeroed()
        }
    }

    fn launch(&self, device: &CudaDevice, kernel: &str) -> Result<()> {
        // Of no parts there is nothing to write.
        let grid = Grid::new(self.count.min(1), THREADS);
        device.launch(&MODULE, kernel, grid, self)
    }
}

pub(super) fn rows(
    device: &CudaDevice,
    out: ViewMut<'_>,
    draws: Draws<'_>,
    of: Rows,
) -> Result<()> {
    let params = Parts {
        rows: of.rows,
        module: of.module,
        scaled: u32::from(of.scaled),
        ..Parts::new(out.as_view(), draws)
    };
    params.launch(device, "parts_rows")
}

pub(super) fn blocks(
    device: &CudaDevice,
    out: ViewMut<'_>,
    draws: Draws<'_>,
    of: Blocks,
) -> Result<()> {
    let swaps = Tensor::temporary(&draws.device(), DType::F32, 1, out.rows());
    let params = Parts {
        swaps: swaps.view().ptr(),
        left_out: count(of.left_out),
        groups: count(of.groups),
        group: count(of.group),
        ..Parts::new(out.as_view(), draws)
    };
    params.launch(device, "parts_blocks")
}
