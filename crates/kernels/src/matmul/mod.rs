//! Matrix products with row pitch and accumulation: `dst = beta * dst + alpha * op(a) op(b)`.
//!
//! | function | formula | use |
//! |---|---|---|
//! | [`nt`] | `a b^T` | forward of a linear layer, `y = x W^T` |
//! | [`nn`] | `a b` | gradient of its input, `dx = dy W` |
//! | [`tn`] | `a^T b` | gradient of its weight, `dW = dy^T x` |
//!
//! Every argument may be f32 or bf16 and have any pitch. Products are summed in f32 and rounded
//! once to the dtype of `dst`. With `beta = 0` the contents of `dst` are never read, so they may be
//! stale. The order of summation depends on the shapes alone, so the bits do not depend on the
//! number of threads.

pub(crate) mod block;
mod cpu;
mod cuda;
#[cfg(test)]
mod tests;
mod transpose;

use crate::device::common;
use crate::error::check_shape;
use crate::tensor::with_dtype;
use crate::{Result, View, ViewMut};

/// Which operand is stored transposed.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub(crate) enum Layout {
    /// `a [M,K]`, `b [N,K]`.
    Nt,
    /// `a [M,K]`, `b [K,N]`.
    Nn,
    /// `a [K,M]`, `b [K,N]`.
    Tn,
}

/// Sizes and factors of one product.
#[derive(Clone, Copy, Debug)]
struct Product {
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    beta: f32,
    alpha: f32,
}

/// `dst [M,N] = beta * dst + alpha * a [M,K] b [N,K]^T`.
///
/// # Errors
/// If the shapes do not fit together.
///
/// # Examples
/// ```
/// use ferrotune_kernels::{Tensor, matmul};
/// let x = Tensor::from_f32(vec![1.0, 2.0], 1, 2);
/// let weight = Tensor::from_f32(vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0], 3, 2);
/// let mut y = Tensor::from_f32(vec![f32::NAN; 3], 1, 3);
/// matmul::nt(y.view_mut(), 0.0, 1.0, x.view(), weight.view())?;
/// assert_eq!(y.to_f32_vec(), [1.0, 2.0, 3.0]);
/// # Ok::<(), ferrotune_kernels::Error>(())
/// ```
pub fn nt(dst: ViewMut<'_>, beta: f32, alpha: f32, a: View<'_>, b: View<'_>) -> Result<()> {
    const OP: &str = "matmul::nt";
    let ([m, k], n) = (a.shape(), b.rows());
    check_shape(OP, "b [N,K]", [n, k], b.shape())?;
    check_shape(OP, "dst [M,N]", [m, n], dst.shape())?;
    run(
        OP,
        dst,
        a,
        b,
        &Product {
            layout: Layout::Nt,
            m,
            n,
            k,
            beta,
            alpha,
        },
    )
}

/// `dst [M,N] = beta * dst + alpha * a [M,K] b [K,N]`.
///
/// # Errors
/// If the shapes do not fit together.
pub fn nn(dst: ViewMut<'_>, beta: f32, alpha: f32, a: View<'_>, b: View<'_>) -> Result<()> {
    const OP: &str = "matmul::nn";
    let ([m, k], n) = (a.shape(), b.cols());
    check_shape(OP, "b [K,N]", [k, n], b.shape())?;
    check_shape(OP, "dst [M,N]", [m, n], dst.shape())?;
    run(
        OP,
        dst,
        a,
        b,
        &Product {
            layout: Layout::Nn,
            m,
            n,
            k,
            beta,
            alpha,
        },
    )
}

/// `dst [M,N] = beta * dst + alpha * a [K,M]^T b [K,N]`.
///
/// # Errors
/// If the shapes do not fit together.
pub fn tn(dst: ViewMut<'_>, beta: f32, alpha: f32, a: View<'_>, b: View<'_>) -> Result<()> {
    const OP: &str = "matmul::tn";
    let ([k, m], n) = (a.shape(), b.cols());
    check_shape(OP, "b [K,N]", [k, n], b.shape())?;
    check_shape(OP, "dst [M,N]", [m, n], dst.shape())?;
    run(
        OP,
        dst,
        a,
        b,
        &Product {
            layout: Layout::Tn,
            m,
            n,
            k,
            beta,
            alpha,
        },
    )
}

fn run(
    op: &'static str,
    dst: ViewMut<'_>,
    a: View<'_>,
    b: View<'_>,
    product: &Product,
) -> Result<()> {
    if let Some(device) = common(op, &[dst.device(), a.device(), b.device()])? {
        return cuda::product(device, &dst, a, b, product);
    }
    with_dtype!(dst.dtype(), D => with_dtype!(a.dtype(), A => with_dtype!(b.dtype(), B => {
        if let (Some(dst), Some(a), Some(b)) = (dst.typed::<D>(), a.typed::<A>(), b.typed::<B>()) {
            cpu::product(dst, a, b, product);
        }
    })));
    Ok(())
}
