use super::Product;
use crate::cuda::{CudaDevice, Gemm, Operand};
use crate::{Result, View, ViewMut};

/// The product by cublasLt: `a` and `b` of one dtype, summed in f32.
pub(super) fn product(
    device: &CudaDevice,
    dst: &ViewMut<'_>,
    a: View<'_>,
    b: View<'_>,
    product: &Product,
) -> Result<()> {
    let Product {
        layout,
        m,
        n,
        k,
        beta,
        alpha,
    } = *product;
    device.gemm(&Gemm {
        layout,
        m,
        n,
        k,
        alpha,
        beta,
        a: operand(a),
        b: operand(b),
        dst: operand(dst.as_view()),
    })
}

fn operand(view: View<'_>) -> Operand {
    Operand {
        ptr: view.ptr(),
        dtype: view.dtype(),
        pitch: view.pitch(),
    }
}
