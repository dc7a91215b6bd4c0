#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "hadamard",
    source: include_str!("kernel.cu"),
};

/// `struct Operand` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Operand {
    matrix: Matrix,
    row_step: u32,
    column_step: u32,
}

impl Operand {
    fn of(view: View<'_>) -> Self {
        Self {
            matrix: Matrix::of(view),
            row_step: u32::from(view.rows() > 1),
            column_step: u32::from(view.cols() > 1),
        }
    }
}

/// `struct Add` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Add {
    out: Matrix,
    a: Operand,
    b: Operand,
    rows: u32,
    cols: u32,
    beta: f32,
    alpha: f32,
}

/// `struct Scale` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Scale {
    out: Matrix,
    b: Operand,
    rows: u32,
    cols: u32,
    offset: f32,
    unused: u32,
}

/// `struct Sums` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Sums {
    sums: u64,
    a: Operand,
    b: Operand,
    rows: u32,
    cols: u32,
    alpha: f32,
    team_threads: u32,
}

pub(super) fn add(
    device: &CudaDevice,
    out: ViewMut<'_>,
    [beta, alpha]: [f32; 2],
    a: View<'_>,
    b: View<'_>,
) -> Result<()> {
    let [rows, cols] = out.shape();
    let params = Add {
        out: Matrix::of(out.as_view()),
        a: Operand::of(a),
        b: Operand::of(b),
        rows: count(rows),
        cols: count(cols),
        beta,
        alpha,
    };
    let grid = Access::Any.elements(rows, cols);
    device.launch(&MODULE, "hadamard_add", grid, &params)
}

pub(super) fn scale(device: &CudaDevice, out: ViewMut<'_>, offset: f32, b: View<'_>) -> Result<()> {
    let [rows, cols] = out.shape();
    let params = Scale {
        out: Matrix::of(out.as_view()),
        b: Operand::of(b),
        rows: count(rows),
        cols: count(cols),
        offset,
        unused: 0,
    };
    let grid = Access::Any.elements(rows, cols);
    device.launch(&MODULE, "hadamard_scale", grid, &params)
}

pub(super) fn add_row_sums(
    device: &CudaDevice,
    sums: ViewMut<'_>,
    alpha: f32,
    [rows, cols]: [usize; 2],
    operands: [View<'_>; 2],
) -> Result<()> {
    let (team_threads, grid) = Access::Any.row_teams(rows, cols);
    let params = Sums {
        team_threads,
        ..Sums::of(sums, alpha, [rows, cols], operands)
    };
    device.launch(&MODULE, "hadamard_row_sums", grid, &params)
}

pub(super) fn add_column_sums(
    device: &CudaDevice,
    sums: ViewMut<'_>,
    alpha: f32,
    [rows, cols]: [usize; 2],
    operands: [View<'_>; 2],
) -> Result<()> {
    let params = Sums::of(sums, alpha, [rows, cols], operands);
    device.launch(&MODULE, "hadamard_column_sums", column_sums(cols), &params)
}

impl Sums {
    fn of(sums: ViewMut<'_>, alpha: f32, [rows, cols]: [usize; 2], [a, b]: [View<'_>; 2]) -> Self {
        Self {
            sums: sums.as_view().ptr(),
            a: Operand::of(a),
            b: Operand::of(b),
            rows: count(rows),
            cols: count(cols),
            alpha,
            team_threads: 0,
        }
    }
}
