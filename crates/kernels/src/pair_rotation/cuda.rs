#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::{Angles, Axis, Pairs, Per};
use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{DType, Device, Result, Tensor, View, ViewMut};
use std::sync::Arc;

pub(crate) static MODULE: Module = Module {
    name: "pair_rotation",
    source: include_str!("kernel.cu"),
};

/// `struct PairRotation` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct PairRotation {
    y: Matrix,
    x: Matrix,
    theta: u64,
    alpha: u64,
    coefficients: u64,
    d_theta: u64,
    d_alpha: u64,
    rows: u32,
    cols: u32,
    n: u32,
    half: u32,
    angles: u32,
    per: u32,
    transposed: u32,
    team_threads: u32,
}

impl PairRotation {
    fn new(pairs: Pairs, n: usize) -> Self {
        Self {
            n: count(n),
            half: count(pairs.group / 2),
            angles: count(pairs.angles(n)),
            per: match pairs.per {
                Per::Pair => 0,
                Per::Column => 1,
                Per::Coefficient => 2,
            },
            ..bytemuck::Zeroable::zeroed()
        }
    }

    fn of(self, angles: Angles<'_>) -> Self {
        Self {
            theta: angles.theta.ptr(),
            alpha: angles.alpha.ptr(),
            ..self
        }
    }

    fn over(self, matrix: View<'_>) -> Self {
        Self {
            y: Matrix::of(matrix),
            rows: count(matrix.rows()),
            cols: count(matrix.cols()),
            ..self
        }
    }
}

pub(super) fn coefficients(
    device: &CudaDevice,
    coefficients: ViewMut<'_>,
    angles: Angles<'_>,
    pairs: Pairs,
) -> Result<()> {
    let params = PairRotation {
        coefficients: coefficients.as_view().ptr(),
        ..PairRotation::new(pairs, coefficients.cols()).of(angles)
    };
    let grid = Access::Any.elements(1, coefficients.cols());
    device.launch(&MODULE, "pair_rotation_coefficients", grid, &params)
}

pub(super) fn rotate(
    device: &CudaDevice,
    y: ViewMut<'_>,
    coefficients: View<'_>,
    pairs: Pairs,
    axis: Axis,
    transposed: bool,
) -> Result<()> {
    let params = PairRotation {
        coefficients: coefficients.ptr(),
        transposed: u32::from(transposed),
        ..PairRotation::new(pairs, coefficients.cols()).over(y.as_view())
    };
    let [rows, cols] = y.shape();
    let (kernel, grid) = match axis {
        Axis::Columns => ("pair_rotation_columns", [rows, cols / 2]),
        Axis::Rows => ("pair_rotation_rows", [rows / 2, cols]),
    };
    let grid = Access::Any.elements(grid[0], grid[1]);
    device.launch(&MODULE, kernel, grid, &params)
}

pub(super) fn add_gradients(
    device: &Arc<CudaDevice>,
    [d_theta, d_alpha]: [ViewMut<'_>; 2],
    [d, x]: [View<'_>; 2],
    angles: Angles<'_>,
    pairs: Pairs,
    axis: Axis,
) -> Result<()> {
    let n = super::along(d.shape(), axis);
    let on = Device::Cuda(Arc::clone(device));
    let mut sums = Tensor::temporary(&on, DType::F32, 2, n);
    sums.view_mut().fill(0.0);
    let mut params = PairRotation {
        x: Matrix::of(x),
        coefficients: sums.view().ptr(),
        d_theta: d_theta.as_view().ptr(),
        d_alpha: d_alpha.as_view().ptr(),
        ..PairRotation::new(pairs, n).of(angles).over(d)
    };
    match axis {
        Axis::Columns => {
            let grid = column_sums(n);
            let grid = Grid::new([grid.blocks[0], 2], grid.threads);
            device.launch(&MODULE, "pair_rotation_column_sums", grid, &params)?;
        }
        Axis::Rows => {
            let (team_threads, grid) = Access::Any.row_teams(2 * n, d.cols());
            params.team_threads = team_threads;
            device.launch(&MODULE, "pair_rotation_row_sums", grid, &params)?;
        }
    }
    let grid = Access::Any.elements(1, pairs.angles(n));
    device.launch(&MODULE, "pair_rotation_angle_gradients", grid, &params)
}
