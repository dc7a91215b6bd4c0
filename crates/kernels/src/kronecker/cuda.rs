#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::{Second, oriented};
use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "kronecker",
    source: include_str!("kernel.cu"),
};

/// `struct Kronecker` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Kronecker {
    product: Matrix,
    first: u64,
    second: u64,
    sums: u64,
    rows: u32,
    cols: u32,
    p: u32,
    q: u32,
    across: u32,
    blocks: u32,
    transposed: u32,
    alpha: f32,
    team_threads: u32,
    unused: u32,
}

impl Kronecker {
    fn new(product: View<'_>, [p, q]: [usize; 2], transposed: bool, alpha: f32) -> Self {
        let [rows, cols] = product.shape();
        let [down, across] = [rows.div_ceil(p.max(1)), cols.div_ceil(q.max(1))];
        Self {
            product: Matrix::of(product),
            first: 0,
            second: 0,
            sums: 0,
            rows: count(rows),
            cols: count(cols),
            p: count(p),
            q: count(q),
            across: count(across),
            blocks: count(down * across),
            transposed: u32::from(transposed),
            alpha,
            team_threads: 0,
            unused: 0,
        }
    }
}

pub(super) fn add(
    device: &CudaDevice,
    out: ViewMut<'_>,
    alpha: f32,
    a: View<'_>,
    b: Second<'_>,
) -> Result<()> {
    let [rows, cols] = out.shape();
    let params = Kronecker {
        first: a.ptr(),
        second: b.matrix.ptr(),
        ..Kronecker::new(out.as_view(), b.shape(), b.transposed, alpha)
    };
    let grid = Access::Any.elements(rows, cols);
    device.launch(&MODULE, "kronecker_add", grid, &params)
}

pub(super) fn add_first_gradient(
    device: &CudaDevice,
    d_a: ViewMut<'_>,
    alpha: f32,
    d: View<'_>,
    b: Second<'_>,
) -> Result<()> {
    let [blocks, elements] = [d_a.rows() * d_a.cols(), b.matrix.rows() * b.matrix.cols()];
    let (team_threads, grid) = Access::Any.row_teams(blocks, elements);
    let params = Kronecker {
        second: b.matrix.ptr(),
        sums: d_a.as_view().ptr(),
        team_threads,
        ..Kronecker::new(d, b.shape(), b.transposed, alpha)
    };
    device.launch(&MODULE, "kronecker_first_gradient", grid, &params)
}

pub(super) fn add_second_gradient(
    device: &CudaDevice,
    d_b: ViewMut<'_>,
    transposed: bool,
    alpha: f32,
    d: View<'_>,
    a: View<'_>,
) -> Result<()> {
    let shape = oriented(d_b.shape(), transposed);
    let params = Kronecker {
        first: a.ptr(),
        sums: d_b.as_view().ptr(),
        ..Kronecker::new(d, shape, transposed, alpha)
    };
    let grid = column_sums(shape[0] * shape[1]);
    device.launch(&MODULE, "kronecker_second_gradient", grid, &params)
}
