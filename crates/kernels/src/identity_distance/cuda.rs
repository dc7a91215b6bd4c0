#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::count;
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{Result, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "identity_distance",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 512;

/// `struct Gram` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Gram {
    gram: u64,
    distance: u64,
    rank: u32,
    unused: u32,
}

pub(super) fn direction(
    device: &CudaDevice,
    gram: ViewMut<'_>,
    distance: ViewMut<'_>,
) -> Result<()> {
    let params = Gram {
        gram: gram.as_view().ptr(),
        distance: distance.as_view().ptr(),
        rank: count(gram.rows()),
        unused: 0,
    };
    let grid = Grid::new(1, THREADS);
    device.launch(&MODULE, "identity_distance", grid, &params)
}
