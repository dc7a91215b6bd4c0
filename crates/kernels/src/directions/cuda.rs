#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::count;
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{DType, Device, Result, Tensor, View, ViewMut};
use std::sync::Arc;

pub(crate) static MODULE: Module = Module {
    name: "directions",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 512;

/// `struct Directions` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Directions {
    vectors: u64,
    d_vectors: u64,
    directions: u64,
    scratch: u64,
    n: u32,
    rank: u32,
    orthogonal: u32,
    unused: u32,
}

impl Directions {
    fn new(directions: View<'_>, vectors: View<'_>, orthogonal: bool) -> Self {
        Self {
            vectors: vectors.ptr(),
            d_vectors: 0,
            directions: directions.ptr(),
            scratch: 0,
            n: count(vectors.rows()),
            rank: count(vectors.cols()),
            orthogonal: u32::from(orthogonal),
            unused: 0,
        }
    }

    fn launch(mut self, device: &Arc<CudaDevice>, kernel: &str) -> Result<()> {
        let (n, rank) = (self.n as usize, self.rank as usize);
        if rank == 0 {
            return Ok(());
        }
        // As f64, of which each takes two f32.
        let on = Device::Cuda(Arc::clone(device));
        let scratch = Tensor::temporary(&on, DType::F32, rank, 2 * (2 * n + 1));
        self.scratch = scratch.view().ptr();
        let blocks = if self.orthogonal == 1 { 1 } else { self.rank };
        device.launch(&MODULE, kernel, Grid::new(blocks, THREADS), &self)
    }
}

pub(super) fn forward(
    device: &Arc<CudaDevice>,
    directions: ViewMut<'_>,
    vectors: View<'_>,
    orthogonal: bool,
) -> Result<()> {
    Directions::new(directions.as_view(), vectors, orthogonal).launch(device, "directions_forward")
}

pub(super) fn add_gradient(
    device: &Arc<CudaDevice>,
    d_vectors: ViewMut<'_>,
    d: View<'_>,
    vectors: View<'_>,
    orthogonal: bool,
) -> Result<()> {
    let params = Directions {
        d_vectors: d_vectors.as_view().ptr(),
        ..Directions::new(d, vectors, orthogonal)
    };
    params.launch(device, "directions_gradient")
}
