#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::{Access, Matrix, count, shared_rows};
use crate::cuda::{CudaDevice, Grid, Module, convert};
use crate::{Indices, Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "embedding",
    source: include_str!("kernel.cu"),
};

/// Threads of a block of the backward pass, as in the kernel.
const BACKWARD_THREADS: u32 = 256;

/// `struct Forward` of the kernels, and `struct Backward`: `d_out`, `d_table`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    from: Matrix,
    to: Matrix,
    ids: u64,
    rows: u32,
    cols: u32,
    /// Id of the first row of the table.
    first: u32,
    /// Threads of a block that share a row, in the forward pass.
    threads: u32,
}

impl Params {
    fn new(from: View<'_>, first: usize, ids: &Indices<'_>, to: View<'_>) -> Self {
        Self {
            from: Matrix::of(from),
            to: Matrix::of(to),
            ids: ids.ptr(),
            rows: count(ids.len()),
            cols: count(to.cols()),
            first: count(first),
            threads: 0,
        }
    }
}

pub(super) fn forward(
    device: &CudaDevice,
    table: View<'_>,
    first: usize,
    ids: &Indices<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    let mut params = Params::new(table, first, ids, out.as_view());
    let copy = convert::Copy::of(&params.from, &params.to, out.cols());
    let kernel = format!("embedding_forward_{}", copy.suffix());
    let (threads, grid) = shared_rows(ids.len(), copy.groups(out.cols()));
    params.threads = threads;
    device.launch(&MODULE, &kernel, grid, &params)
}

/// `d_table` has its rows back to back.
pub(super) fn backward(
    device: &CudaDevice,
    d_out: View<'_>,
    first: usize,
    ids: &Indices<'_>,
    d_table: ViewMut<'_>,
) -> Result<()> {
    let params = Params::new(d_out, first, ids, d_table.as_view());
    let access = Access::of(&[params.from], &[d_table.ptr()], &[d_out.cols()]);
    let tiles = access.groups(d_out.cols()).div_ceil(BACKWARD_THREADS);
    let kernel = format!("embedding_backward_{}", access.suffix());
    let grid = Grid::new([count(ids.len()), tiles], BACKWARD_THREADS);
    device.launch(&MODULE, &kernel, grid, &params)
}
