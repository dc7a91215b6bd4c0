#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Weight;
use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "rms_norm",
    source: include_str!("kernel.cu"),
};

/// `struct Forward` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Forward {
    x: Matrix,
    y: Matrix,
    weight: u64,
    rstd: u64,
    rows: u32,
    cols: u32,
    team_threads: u32,
    eps: f32,
    offset: f32,
    unused: u32,
}

/// `struct AddForward` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AddForward {
    norm: Forward,
    branch: Matrix,
}

/// `struct Backward` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Backward {
    dy: Matrix,
    x: Matrix,
    dx: Matrix,
    weight: u64,
    rstd: u64,
    d_weight: u64,
    rows: u32,
    cols: u32,
    team_threads: u32,
    offset: f32,
}

/// Vectors of a pass: the weight, what makes the root, and its reciprocal.
#[derive(Clone, Copy)]
pub(super) struct Statistics<'a> {
    pub(super) weight: Weight<'a>,
    pub(super) eps: f32,
    pub(super) rstd: View<'a>,
}

impl Forward {
    fn new(x: View<'_>, y: View<'_>, statistics: Statistics<'_>) -> Self {
        Self {
            x: Matrix::of(x),
            y: Matrix::of(y),
            weight: statistics.weight.values.ptr(),
            rstd: statistics.rstd.ptr(),
            rows: count(x.rows()),
            cols: count(x.cols()),
            team_threads: 0,
            eps: statistics.eps,
            offset: statistics.weight.offset,
            unused: 0,
        }
    }
}

/// `kernel` is `forward`, which writes `rstd`, or `apply`, which reads it.
pub(super) fn forward(
    device: &CudaDevice,
    kernel: &str,
    x: View<'_>,
    y: ViewMut<'_>,
    statistics: Statistics<'_>,
) -> Result<()> {
    let mut params = Forward::new(x, y.as_view(), statistics);
    let access = Access::of(&[params.x, params.y], &[params.weight], &[x.cols()]);
    let (team, grid) = access.row_teams(x.rows(), x.cols());
    params.team_threads = team;
    let kernel = format!("rms_norm_{kernel}_{}", access.suffix());
    device.launch(&MODULE, &kernel, grid, &params)
}

pub(super) fn add_forward(
    device: &CudaDevice,
    residual: ViewMut<'_>,
    branch: View<'_>,
    y: ViewMut<'_>,
    statistics: Statistics<'_>,
) -> Result<()> {
    let [rows, cols] = branch.shape();
    let (mut norm, branch) = (
        Forward::new(residual.as_view(), y.as_view(), statistics),
        Matrix::of(branch),
    );
    let access = Access::of(&[norm.x, branch, norm.y], &[norm.weight], &[cols]);
    let (team, grid) = access.row_teams(rows, cols);
    norm.team_threads = team;
    let kernel = format!("rms_norm_add_forward_{}", access.suffix());
    device.launch(&MODULE, &kernel, grid, &AddForward { norm, branch })
}

pub(super) fn backward(
    device: &CudaDevice,
    dy: View<'_>,
    x: View<'_>,
    weight: Weight<'_>,
    rstd: View<'_>,
    dx: ViewMut<'_>,
    d_weight: Option<ViewMut<'_>>,
) -> Result<()> {
    let [rows, cols] = x.shape();
    let mut params = Backward {
        dy: Matrix::of(dy),
        x: Matrix::of(x),
        dx: Matrix::of(dx.as_view()),
        weight: weight.values.ptr(),
        rstd: rstd.ptr(),
        d_weight: d_weight.as_ref().map_or(0, ViewMut::ptr),
        rows: count(rows),
        cols: count(cols),
        team_threads: 0,
        offset: weight.offset,
    };
    let access = Access::of(&[params.dy, params.x, params.dx], &[params.weight], &[cols]);
    let (team, grid) = access.row_teams(rows, cols);
    params.team_threads = team;
    let kernel = format!("rms_norm_backward_{}", access.suffix());
    device.launch(&MODULE, &kernel, grid, &params)?;
    if d_weight.is_none() {
        return Ok(());
    }
    let (dy, x) = (params.dy.suffix(), params.x.suffix());
    let kernel = format!("rms_norm_backward_weight_{dy}_{x}");
    device.launch(&MODULE, &kernel, column_sums(cols), &params)
}
