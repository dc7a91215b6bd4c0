//! Matrix products with row pitch and accumulation: `dst = beta * dst + alpha * op(a) op(b)`.
//!
//! | function | formula | use |
//! |---|---|---|
//! | [`nt`] | `a b^T` | forward of a linear layer, `y = x W^T` |
//! | [`nt_beside`] | the same, and others over rows of the same `b` | a weight that several products read |
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
use crate::error::{check_dtype, check_shape};
use crate::row_blocks::typed_mut;
use crate::tensor::with_dtype;
use crate::{DType, Error, Result, RowsMut, View, ViewMut};
use std::ops::Range;

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

/// Another product over the `b` of [`nt_beside`].
#[derive(Debug)]
pub struct Beside<'a> {
    /// `[M',K]`, f32 or bf16.
    pub a: View<'a>,
    /// The rows of `b` `[N,K]` that it is multiplied with.
    pub rows: Range<usize>,
    /// `[M',rows]`, f32.
    pub dst: ViewMut<'a>,
}

/// `dst [M,N] = a [M,K] b [N,K]^T`, and for each of `others` `dst [M',rows] = a [M',K] b[rows]^T`.
///
/// The results are those of a call of [`nt`] for each, to the bit but where one row or one column of another product
/// lies in a tile. A CPU reads `b` only once, which is most of the work where there are few rows; a GPU makes one
/// product after the other.
///
/// # Errors
/// If the shapes do not fit together, or one of the other results is not f32.
pub fn nt_beside(
    dst: ViewMut<'_>,
    a: View<'_>,
    b: View<'_>,
    mut others: Vec<Beside<'_>>,
) -> Result<()> {
    const OP: &str = "matmul::nt_beside";
    let ([m, k], n) = (a.shape(), b.rows());
    check_shape(OP, "b [N,K]", [n, k], b.shape())?;
    check_shape(OP, "dst [M,N]", [m, n], dst.shape())?;
    for other in &others {
        let rows = &other.rows;
        if rows.start > rows.end || rows.end > n {
            let message = format!("rows {rows:?} of b, which has {n}");
            return Err(Error::Invalid { op: OP, message });
        }
        check_shape(OP, "another a [M',K]", [other.a.rows(), k], other.a.shape())?;
        let shape = [other.a.rows(), rows.len()];
        check_shape(OP, "another dst [M',rows]", shape, other.dst.shape())?;
        check_dtype(OP, "another dst", DType::F32, other.dst.dtype())?;
    }
    let product = Product {
        layout: Layout::Nt,
        m,
        n,
        k,
        beta: 0.0,
        alpha: 1.0,
    };
    let views = others
        .iter()
        .flat_map(|of| [of.a.device(), of.dst.device()]);
    let devices: Vec<_> = [dst.device(), a.device(), b.device()]
        .into_iter()
        .chain(views)
        .collect();
    if common(OP, &devices)?.is_some() {
        run(OP, dst, a, b, &product)?;
        for other in others {
            nt(other.dst, 0.0, 1.0, other.a, b.row_range(other.rows))?;
        }
        return Ok(());
    }
    let others = others
        .iter_mut()
        .map(|of| (of.a, of.rows.clone(), typed_mut(of.dst.reborrow())));
    let mut others: Vec<(View<'_>, Range<usize>, RowsMut<'_, f32>)> = others.collect();
    let others = others
        .iter_mut()
        .map(|(a, rows, dst)| cpu::Beside::new(*a, rows.clone(), dst));
    on_host(dst, a, b, &product, &others.collect::<Vec<_>>());
    Ok(())
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
    on_host(dst, a, b, product, &[]);
    Ok(())
}

fn on_host(
    dst: ViewMut<'_>,
    a: View<'_>,
    b: View<'_>,
    product: &Product,
    beside: &[cpu::Beside<'_>],
) {
    with_dtype!(dst.dtype(), D => {
        if let Some(dst) = dst.typed::<D>() {
            cpu::product(dst, a, b, product, beside);
        }
    });
}
