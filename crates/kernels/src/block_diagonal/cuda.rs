#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::{Matrix, count};
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "block_diagonal",
    source: include_str!("kernel.cu"),
};

const TILE: usize = 32;
const THREADS: u32 = 256;
/// Most blocks in y.
const MAX_BLOCKS_Y: usize = 65_535;

/// `struct BlockDiagonal` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct BlockDiagonal {
    x: Matrix,
    y: Matrix,
    blocks: u64,
    rows: u32,
    cols: u32,
    n: u32,
    tiles: u32,
}

impl BlockDiagonal {
    fn new(x: View<'_>, y: View<'_>, blocks: View<'_>) -> Self {
        let n = blocks.cols();
        Self {
            x: Matrix::of(x),
            y: Matrix::of(y),
            blocks: blocks.ptr(),
            rows: count(x.rows()),
            cols: count(x.cols()),
            n: count(n),
            tiles: count(n.div_ceil(TILE)),
        }
    }
}

pub(super) fn product(
    device: &CudaDevice,
    y: ViewMut<'_>,
    x: View<'_>,
    blocks: View<'_>,
) -> Result<()> {
    let params = BlockDiagonal::new(x, y.as_view(), blocks);
    let rows = x.rows().div_ceil(TILE).min(MAX_BLOCKS_Y);
    let across = count(x.cols() / blocks.cols()) * params.tiles;
    let grid = Grid::new([across, count(rows)], THREADS);
    device.launch(&MODULE, "block_diagonal_product", grid, &params)
}

pub(super) fn gradient(
    device: &CudaDevice,
    d_blocks: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
) -> Result<()> {
    let params = BlockDiagonal::new(x, dy, d_blocks.as_view());
    let blocks = count(x.cols() / d_blocks.cols());
    let grid = Grid::new([blocks, params.tiles * params.tiles], THREADS);
    device.launch(&MODULE, "block_diagonal_gradient", grid, &params)
}
