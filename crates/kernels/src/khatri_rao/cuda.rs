#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::Operands;
use crate::cuda::rows::{Access, Matrix, column_sums, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "khatri_rao",
    source: include_str!("kernel.cu"),
};

/// `struct KhatriRao` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct KhatriRao {
    product: Matrix,
    a: Matrix,
    g: Matrix,
    scale: u64,
    sums: u64,
    rows: u32,
    cols: u32,
    of_g: u32,
    alpha: f32,
}

impl KhatriRao {
    fn new(product: View<'_>, of: Operands<'_>, alpha: f32) -> Self {
        Self {
            product: Matrix::of(product),
            a: Matrix::of(of.a),
            g: Matrix::of(of.g),
            scale: of.scale.ptr(),
            sums: 0,
            rows: count(product.rows()),
            cols: count(product.cols()),
            of_g: count(of.g.rows()),
            alpha,
        }
    }
}

pub(super) fn product(device: &CudaDevice, out: ViewMut<'_>, of: Operands<'_>) -> Result<()> {
    let params = KhatriRao::new(out.as_view(), of, 1.0);
    let grid = Access::Any.elements(out.rows(), out.cols());
    device.launch(&MODULE, "khatri_rao_product", grid, &params)
}

pub(super) fn add_scale_gradient(
    device: &CudaDevice,
    d_scale: ViewMut<'_>,
    alpha: f32,
    d: View<'_>,
    of: Operands<'_>,
) -> Result<()> {
    let params = KhatriRao {
        sums: d_scale.as_view().ptr(),
        ..KhatriRao::new(d, of, alpha)
    };
    let grid = column_sums(d.cols());
    device.launch(&MODULE, "khatri_rao_scale_gradient", grid, &params)
}

pub(super) fn add_second_gradient(
    device: &CudaDevice,
    d_g: ViewMut<'_>,
    alpha: f32,
    d: View<'_>,
    of: Operands<'_>,
) -> Result<()> {
    let params = KhatriRao {
        g: Matrix::of(d_g.as_view()),
        ..KhatriRao::new(d, of, alpha)
    };
    let grid = Access::Any.elements(d.rows(), d_g.rows());
    device.launch(&MODULE, "khatri_rao_second_gradient", grid, &params)
}
