#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Operands;
use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "dora",
    source: include_str!("kernel.cu"),
};

/// `struct Norms` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Norms {
    weight: Matrix,
    b: u64,
    cross: u64,
    spread: u64,
    norms: u64,
    rows: u32,
    cols: u32,
    rank: u32,
    team_threads: u32,
    scale: f32,
    unused: u32,
}

/// `struct Scale` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Scale {
    y: Matrix,
    magnitude: u64,
    norms: u64,
    rows: u32,
    cols: u32,
}

/// `struct Backward` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Backward {
    dy: Matrix,
    u: Matrix,
    norms: u64,
    d_magnitude: u64,
    rows: u32,
    cols: u32,
}

pub(super) fn row_norms(device: &CudaDevice, of: &Operands<'_>, norms: ViewMut<'_>) -> Result<()> {
    let [rows, cols] = of.weight.shape();
    let weight = Matrix::of(of.weight);
    let access = Access::of(&[weight], &[], &[cols]);
    let (team_threads, grid) = access.row_teams(rows, cols);
    let params = Norms {
        weight,
        b: of.b.ptr(),
        cross: of.cross.ptr(),
        spread: of.spread.ptr(),
        norms: norms.as_view().ptr(),
        rows: count(rows),
        cols: count(cols),
        rank: count(of.b.cols()),
        team_threads,
        scale: of.scale,
        unused: 0,
    };
    let kernel = format!("dora_row_norms_{}", access.suffix());
    device.launch(&MODULE, &kernel, grid, &params)
}

pub(super) fn scale(
    device: &CudaDevice,
    y: ViewMut<'_>,
    magnitude: View<'_>,
    norms: View<'_>,
) -> Result<()> {
    let params = Scale {
        y: Matrix::of(y.as_view()),
        magnitude: magnitude.ptr(),
        norms: norms.ptr(),
        rows: count(y.rows()),
        cols: count(y.cols()),
    };
    let access = Access::of(&[params.y], &[params.magnitude, params.norms], &[y.cols()]);
    let kernel = format!("dora_scale_{}", access.suffix());
    device.launch(
        &MODULE,
        &kernel,
        access.elements(y.rows(), y.cols()),
        &params,
    )
}

pub(super) fn backward(
    device: &CudaDevice,
    dy: View<'_>,
    u: View<'_>,
    norms: View<'_>,
    d_magnitude: ViewMut<'_>,
) -> Result<()> {
    let params = Backward {
        dy: Matrix::of(dy),
        u: Matrix::of(u),
        norms: norms.ptr(),
        d_magnitude: d_magnitude.as_view().ptr(),
        rows: count(dy.rows()),
        cols: count(dy.cols()),
    };
    device.launch(&MODULE, "dora_backward", column_sums(dy.cols()), &params)
}
