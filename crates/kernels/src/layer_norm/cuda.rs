#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Affine;
use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "layer_norm",
    source: include_str!("kernel.cu"),
};

/// `struct Forward` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Forward {
    x: Matrix,
    y: Matrix,
    weight: u64,
    bias: u64,
    statistics: u64,
    rows: u32,
    cols: u32,
    team_threads: u32,
    eps: f32,
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
    statistics: u64,
    d_weight: u64,
    rows: u32,
    cols: u32,
    team_threads: u32,
    unused: u32,
}

impl Forward {
    fn new(x: View<'_>, affine: Affine<'_>, y: View<'_>, statistics: View<'_>) -> Self {
        Self {
            x: Matrix::of(x),
            y: Matrix::of(y),
            weight: affine.weight.ptr(),
            bias: affine.bias.ptr(),
            statistics: statistics.ptr(),
            rows: count(x.rows()),
            cols: count(x.cols()),
            team_threads: 0,
            eps: affine.eps,
        }
    }
}

/// `kernel` is `forward`, which writes the statistics, or `apply`, which reads them.
pub(super) fn forward(
    device: &CudaDevice,
    kernel: &str,
    x: View<'_>,
    affine: Affine<'_>,
    y: ViewMut<'_>,
    statistics: View<'_>,
) -> Result<()> {
    let mut params = Forward::new(x, affine, y.as_view(), statistics);
    let vectors = [params.weight, params.bias];
    let access = Access::of(&[params.x, params.y], &vectors, &[x.cols()]);
    let (team, grid) = access.row_teams(x.rows(), x.cols());
    params.team_threads = team;
    let kernel = format!("layer_norm_{kernel}_{}", access.suffix());
    device.launch(&MODULE, &kernel, grid, &params)
}

pub(super) fn add_forward(
    device: &CudaDevice,
    residual: ViewMut<'_>,
    branch: View<'_>,
    affine: Affine<'_>,
    y: ViewMut<'_>,
    statistics: ViewMut<'_>,
) -> Result<()> {
    let [rows, cols] = branch.shape();
    let (residual, y) = (residual.as_view(), y.as_view());
    let mut norm = Forward::new(residual, affine, y, statistics.as_view());
    let branch = Matrix::of(branch);
    let vectors = [norm.weight, norm.bias];
    let access = Access::of(&[norm.x, branch, norm.y], &vectors, &[cols]);
    let (team, grid) = access.row_teams(rows, cols);
    norm.team_threads = team;
    let kernel = format!("layer_norm_add_forward_{}", access.suffix());
    device.launch(&MODULE, &kernel, grid, &AddForward { norm, branch })
}

pub(super) fn backward(
    device: &CudaDevice,
    dy: View<'_>,
    x: View<'_>,
    weight: View<'_>,
    statistics: View<'_>,
    dx: ViewMut<'_>,
    d_weight: Option<ViewMut<'_>>,
) -> Result<()> {
    let [rows, cols] = x.shape();
    let mut params = Backward {
        dy: Matrix::of(dy),
        x: Matrix::of(x),
        dx: Matrix::of(dx.as_view()),
        weight: weight.ptr(),
        statistics: statistics.ptr(),
        d_weight: d_weight.as_ref().map_or(0, ViewMut::ptr),
        rows: count(rows),
        cols: count(cols),
        team_threads: 0,
        unused: 0,
    };
    let matrices = [params.dy, params.x, params.dx];
    let access = Access::of(&matrices, &[params.weight], &[cols]);
    let (team, grid) = access.row_teams(rows, cols);
    params.team_threads = team;
    let kernel = format!("layer_norm_backward_{}", access.suffix());
    device.launch(&MODULE, &kernel, grid, &params)?;
    if d_weight.is_none() {
        return Ok(());
    }
    let (dy, x) = (params.dy.suffix(), params.x.suffix());
    let kernel = format!("layer_norm_backward_weight_{dy}_{x}");
    device.launch(&MODULE, &kernel, column_sums(cols), &params)
}
