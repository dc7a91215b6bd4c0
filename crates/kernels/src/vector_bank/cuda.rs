#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::{Along, Composition};
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{DType, Device, Result, Tensor, View, ViewMut};
use std::sync::Arc;

pub(crate) static MODULE: Module = Module {
    name: "vector_bank",
    source: include_str!("kernel.cu"),
};

/// Threads of a block whose warps have a piece each.
const PIECE_THREADS: u32 = 128;
const WARP: u32 = 32;

/// `struct VectorBank` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct VectorBank {
    matrix: Matrix,
    logits: u64,
    bank: u64,
    gradient: u64,
    chosen: u64,
    weights: u64,
    dots: u64,
    rows: u32,
    cols: u32,
    pieces: u32,
    vectors: u32,
    length: u32,
    topk: u32,
    across: u32,
    along_columns: u32,
}

/// A launch that knows which vectors are chosen.
struct Chosen<'a> {
    device: &'a Arc<CudaDevice>,
    params: VectorBank,
    /// Chosen vectors, weights and products lie here.
    _scratch: Tensor,
}

impl<'a> Chosen<'a> {
    fn new(device: &'a Arc<CudaDevice>, matrix: View<'_>, of: Composition<'_>) -> Result<Self> {
        let [pieces, vectors] = of.logits.shape();
        let on = Device::Cuda(Arc::clone(device));
        let scratch = Tensor::temporary(&on, DType::F32, 3, pieces * of.topk);
        let part = |row: usize| scratch.view().row_range(row..row + 1).ptr();
        let params = VectorBank {
            matrix: Matrix::of(matrix),
            logits: of.logits.ptr(),
            bank: of.bank.ptr(),
            gradient: 0,
            chosen: part(0),
            weights: part(1),
            dots: part(2),
            rows: count(matrix.rows()),
            cols: count(matrix.cols()),
            pieces: count(pieces),
            vectors: count(vectors),
            length: count(of.bank.cols()),
            topk: count(of.topk),
            across: count(of.pieces_across(matrix.cols())),
            along_columns: u32::from(of.along == Along::Columns),
        };
        let chosen = Self {
            device,
            params,
            _scratch: scratch,
        };
        chosen.launch_pieces("vector_bank_choose")?;
        Ok(chosen)
    }

    fn adding_to(mut self, gradient: View<'_>) -> Self {
        self.params.gradient = gradient.ptr();
        self
    }

    fn launch(&self, kernel: &str, grid: Grid) -> Result<()> {
        self.device.launch(&MODULE, kernel, grid, &self.params)
    }

    fn launch_pieces(&self, kernel: &str) -> Result<()> {
        let blocks = self.params.pieces.div_ceil(PIECE_THREADS / WARP);
        self.launch(kernel, Grid::new(blocks, PIECE_THREADS))
    }
}

pub(super) fn compose(
    device: &Arc<CudaDevice>,
    out: ViewMut<'_>,
    of: Composition<'_>,
) -> Result<()> {
    let grid = Access::Any.elements(out.rows(), out.cols());
    Chosen::new(device, out.as_view(), of)?.launch("vector_bank_compose", grid)
}

pub(super) fn add_logits_gradient(
    device: &Arc<CudaDevice>,
    d_logits: ViewMut<'_>,
    d: View<'_>,
    of: Composition<'_>,
) -> Result<()> {
    let chosen = Chosen::new(device, d, of)?.adding_to(d_logits.as_view());
    chosen.launch_pieces("vector_bank_logits_gradient")
}

pub(super) fn add_bank_gradient(
    device: &Arc<CudaDevice>,
    d_bank: ViewMut<'_>,
    d: View<'_>,
    of: Composition<'_>,
) -> Result<()> {
    let grid = Access::Any.elements(d_bank.rows(), d_bank.cols());
    let chosen = Chosen::new(device, d, of)?.adding_to(d_bank.as_view());
    chosen.launch("vector_bank_bank_gradient", grid)
}
