#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::{Access, Matrix, count, element_grid};
use crate::cuda::{CudaDevice, Grid, Module};
use crate::dequantise::{Int8, Int8Parts};
use crate::{Indices, Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "int8_linear",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 256;
/// Rows that threads of `flags` look at, at least, before there are more threads.
const ROWS_EACH: usize = 32;

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Input {
    x: Matrix,
    codes: Matrix,
    scales: u64,
    outliers: u64,
    documents: u64,
    rows: u32,
    cols: u32,
    bounds: u32,
    threshold: f32,
}

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Finish {
    x: Matrix,
    sums: Matrix,
    y: Matrix,
    scales: u64,
    outliers: u64,
    weight: u64,
    absmax: u64,
    rows: u32,
    out: u32,
    cols: u32,
    unused: u32,
}

/// Where quantising writes to.
pub(super) struct Quantised<'a> {
    /// `[T, in]`.
    pub(super) codes: ViewMut<'a>,
    /// `[T, 1]`.
    pub(super) scales: ViewMut<'a>,
    /// Words, see `Outliers`.
    pub(super) outliers: ViewMut<'a>,
}

pub(super) fn quantise(
    device: &CudaDevice,
    x: View<'_>,
    threshold: f32,
    documents: &Indices<'_>,
    to: Quantised<'_>,
) -> Result<()> {
    let [rows, cols] = x.shape();
    let outliers = to.outliers.ptr();
    // Flags, and how many, are 0.
    to.outliers.columns(0..cols + 1).fill(0.0);
    let params = Input {
        x: Matrix::of(x),
        codes: Matrix::of(to.codes.as_view()),
        scales: to.scales.ptr(),
        outliers,
        documents: documents.ptr(),
        rows: count(rows),
        cols: count(cols),
        bounds: count(documents.len()),
        threshold,
    };
    if threshold > 0.0 {
        let grid = element_grid(rows.div_ceil(ROWS_EACH), count(cols));
        device.launch(&MODULE, "int8_linear_flags", grid, &params)?;
        let grid = Grid::new(1, THREADS);
        device.launch(&MODULE, "int8_linear_list", grid, &params)?;
    }
    let grid = Grid::new(count(rows), THREADS);
    device.launch(&MODULE, "int8_linear_codes", grid, &params)
}

pub(super) fn finish(
    x: View<'_>,
    weight: &Int8,
    scales: View<'_>,
    outliers: View<'_>,
    sums: Option<View<'_>>,
    y: ViewMut<'_>,
) -> Result<()> {
    let (Int8Parts::Cuda { codes, absmax }, Some(device)) = (weight.parts(), x.device()) else {
        unreachable!("devices were compared");
    };
    let [rows, out] = y.shape();
    let params = Finish {
        x: Matrix::of(x),
        sums: Matrix::of(sums.unwrap_or(y.as_view())),
        y: Matrix::of(y.as_view()),
        scales: scales.ptr(),
        outliers: outliers.ptr() + 4 * x.cols() as u64,
        weight: codes,
        absmax,
        rows: count(rows),
        out: count(out),
        cols: count(x.cols()),
        unused: 0,
    };
    let grid = Access::Any.elements(rows, out);
    device.launch(&MODULE, "int8_linear_finish", grid, &params)
}
