#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Norm;
use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{DType, Result, Tensor, View, ViewMut, Workspace};

pub(crate) static MODULE: Module = Module {
    name: "qk_norm",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 128;
const WARP: u32 = 32;

/// `struct HeadNorm` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct HeadNorm {
    x: Matrix,
    out: Matrix,
    weight: u64,
    cos: u64,
    sin: u64,
    rstd: u64,
    sums: u64,
    d_weight: u64,
    offset: f32,
    eps: f32,
    rows: u32,
    heads: u32,
    head_dim: u32,
    half: u32,
    team: u32,
    unused: u32,
}

impl HeadNorm {
    fn new(x: View<'_>, out: View<'_>, norm: &Norm<'_>) -> Self {
        let (head_dim, half) = (norm.weight.cols(), norm.cos.cols());
        Self {
            x: Matrix::of(x),
            out: Matrix::of(out),
            weight: norm.weight.ptr(),
            cos: norm.cos.ptr(),
            sin: norm.sin.ptr(),
            rstd: 0,
            sums: 0,
            d_weight: 0,
            offset: norm.offset,
            eps: norm.eps,
            rows: count(x.rows()),
            heads: count(x.cols() / head_dim),
            head_dim: count(head_dim),
            half: count(half),
            team: 0,
            unused: 0,
        }
    }

    /// Launches a kernel that has a team of lanes for each head, and reads `matrices`.
    fn launch_teams(&self, device: &CudaDevice, kernel: &str, matrices: &[Matrix]) -> Result<()> {
        let widths = [self.head_dim as usize, self.half as usize];
        let access = Access::of(matrices, &[self.weight, self.cos, self.sin], &widths);
        // A lane takes a rotated pair of groups, or one of the rest.
        let items = access.groups(widths[0]) - access.groups(widths[1]);
        let team = items.next_power_of_two().min(WARP);
        let teams = u64::from(self.rows) * u64::from(self.heads);
        let blocks = teams.div_ceil(u64::from(THREADS / team));
        let grid = Grid::new(count(blocks as usize), THREADS);
        let kernel = format!("qk_norm_{kernel}_{}", access.suffix());
        device.launch(&MODULE, &kernel, grid, &Self { team, ..*self })
    }
}

pub(super) fn forward(
    device: &CudaDevice,
    x: View<'_>,
    norm: &Norm<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    let params = HeadNorm::new(x, out.as_view(), norm);
    params.launch_teams(device, "forward", &[params.x, params.out])
}

pub(super) fn backward_in_place(
    device: &CudaDevice,
    d: ViewMut<'_>,
    x: View<'_>,
    norm: &Norm<'_>,
    d_weight: Option<ViewMut<'_>>,
    workspace: &Workspace,
) -> Result<()> {
    let params = HeadNorm::new(x, d.as_view(), norm);
    if let Some(d_weight) = d_weight {
        // Before `d` is overwritten.
        backward_weight(device, params, x, d_weight, workspace)?;
    }
    params.launch_teams(device, "backward_in_place", &[params.x, params.out])
}

/// A sum for every column of every head, then the sum of the heads: as many blocks as the matrix has
/// columns for, and a fixed order.
fn backward_weight(
    device: &CudaDevice,
    mut params: HeadNorm,
    x: View<'_>,
    d_weight: ViewMut<'_>,
    workspace: &Workspace,
) -> Result<()> {
    let [rows, cols] = x.shape();
    let head_dim = params.head_dim as usize;
    let mut rstd = workspace.take(DType::F32, rows, cols / head_dim);
    let buffer = workspace.take_scratch(DType::F32, cols);
    let mut sums = Tensor::from_buffer(buffer, cols / head_dim, head_dim);
    sums.view_mut().fill(0.0);
    params.rstd = rstd.view_mut().ptr();
    params.sums = sums.view_mut().ptr();
    params.d_weight = d_weight.ptr();
    params.launch_teams(device, "statistics", &[params.x])?;
    let kernel = format!(
        "qk_norm_backward_weight_{}_{}",
        params.out.suffix(),
        params.x.suffix()
    );
    device.launch(&MODULE, &kernel, column_sums(cols), &params)?;
    device.launch(&MODULE, "qk_norm_add_heads", column_sums(head_dim), &params)?;
    workspace.give(rstd);
    workspace.give_scratch(sums.into_buffer());
    Ok(())
}
