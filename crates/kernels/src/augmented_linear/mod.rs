//! A linear layer and its low-rank updates as one product: the factors lie in margins of the weight, and what
//! they make of the input lies beside the input.
//!
//! ```text
//!              in     R
//! W~ =  out  [ W    s B ]      x~ = [ x | s ]        s  = x A^T       y  = x~ W~[..out, ..]^T
//!       R    [ A     .  ]     dy~ = [ dy | ds ]      ds = dy (s B)    dx = dy~ W~[.., ..in]
//! ```
//!
//! Linears over one input lie one below the other, and so do their A: R is the sum of their ranks, and B is zero
//! outside the rows and columns of its own update. All matrices have one dtype, but for the factors, which are
//! f32 and are rounded on their way into the margins. Products are longer by R, where separate ones would read and
//! write all of `y` and `dx` once more.
//!
//! # Source
//! Algebra of block matrices, applied to Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models" (2021).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::row_blocks::{typed, typed_mut};
use crate::tensor::with_dtype;
use crate::{Device, Result, Tensor, View, ViewMut, matmul};

/// R is a multiple of this, so that rows of any width start on 32 bytes if those of W do.
const RANKS: usize = 16;

/// Columns that updates whose ranks sum up to `ranks` take.
#[must_use]
pub fn room(ranks: usize) -> usize {
    ranks.next_multiple_of(RANKS)
}

/// W~.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    values: View<'a>,
    ranks: usize,
}

impl<'a> Weight<'a> {
    /// Takes `values [out + R, in + R]` for one.
    ///
    /// # Errors
    /// If it has fewer than R rows or columns.
    pub fn new(values: View<'a>, ranks: usize) -> Result<Self> {
        let least = [ranks.max(values.rows()), ranks.max(values.cols())];
        check_shape("augmented_linear", "W~", least, values.shape())?;
        Ok(Self { values, ranks })
    }

    /// `[out, in]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        self.values.shape().map(|length| length - self.ranks)
    }

    /// R.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// `W [out, in]`.
    #[must_use]
    pub fn base(&self) -> View<'a> {
        let [out, inputs] = self.shape();
        self.values.row_range(0..out).columns(0..inputs)
    }

    /// `A [R, in]`.
    #[must_use]
    pub fn a(&self) -> View<'a> {
        let [out, inputs] = self.shape();
        let rows = out..out + self.ranks;
        self.values.row_range(rows).columns(0..inputs)
    }

    /// `s B [out, R]`.
    #[must_use]
    pub fn b(&self) -> View<'a> {
        let [out, inputs] = self.shape();
        let columns = inputs..inputs + self.ranks;
        self.values.row_range(0..out).columns(columns)
    }
}

/// One update, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a> {
    /// `A [r, in]`, f32, rows back to back.
    pub a: View<'a>,
    /// `B [rows of its linear, r]`, f32, rows back to back.
    pub b: View<'a>,
    /// Factor of `B`.
    pub scale: f32,
    /// The first of the rows of W that are its linear's.
    pub row: usize,
    /// The first of its ranks among R.
    pub rank: usize,
}

/// Writes factors into the margins of `weight [out + R, in + R]`. What lies beside them must be zero from the start.
///
/// # Errors
/// If an update does not fit; the first failure of the GPU.
pub fn place(mut weight: ViewMut<'_>, ranks: usize, updates: &[Factors<'_>]) -> Result<()> {
    const OP: &str = "augmented_linear::place";
    let [out, inputs] = Weight::new(weight.as_view(), ranks)?.shape();
    for update in updates {
        let rank = update.a.rows();
        check_shape(OP, "A [r,in]", [rank, inputs], update.a.shape())?;
        check_shape(OP, "B [out,r]", [update.b.rows(), rank], update.b.shape())?;
        let room = [out, ranks];
        let end = [update.row + update.b.rows(), update.rank + rank];
        check_shape(
            OP,
            "W~ less its margins",
            [end[0].max(out), end[1].max(ranks)],
            room,
        )?;
        update.a.dense_f32(OP, "A")?;
        update.b.dense_f32(OP, "B")?;
        common(OP, &[weight.device(), update.a.device(), update.b.device()])?;
    }
    if let Some(device) = weight.device().cloned() {
        return cuda::place(&device, &mut weight, [out, inputs], updates);
    }
    with_dtype!(weight.dtype(), W => cpu::place(typed_mut::<W>(weight), [out, inputs], updates));
    Ok(())
}

/// Writes `s = x A^T` into R columns of `x [T, in + R]`, behind the first `in`.
///
/// # Errors
/// If the shapes do not fit together; the first failure of the GPU.
pub fn down(x: ViewMut<'_>, weight: &Weight<'_>) -> Result<()> {
    let product = |s: ViewMut<'_>, x: View<'_>| matmul::nt(s, 0.0, 1.0, x, weight.a());
    beside(x, weight.shape()[1], weight.ranks, product)
}

/// Writes `y [T,out] = x~ W~[..out, ..]^T`, with `s` beside `x [T, in + R]`.
///
/// # Errors
/// If the shapes do not fit together; the first failure of the GPU.
pub fn forward(x: View<'_>, weight: &Weight<'_>, y: ViewMut<'_>) -> Result<()> {
    let [out, inputs] = weight.shape();
    let x = x.columns(0..inputs + weight.ranks);
    matmul::nt(y, 0.0, 1.0, x, weight.values.row_range(0..out))
}

/// Writes `ds = dy (s B)` into R columns of `dy [T, out + R]`, behind the first `out`.
///
/// # Errors
/// If the shapes do not fit together; the first failure of the GPU.
pub fn up_backward(dy: ViewMut<'_>, weight: &Weight<'_>) -> Result<()> {
    let product = |ds: ViewMut<'_>, dy: View<'_>| matmul::nn(ds, 0.0, 1.0, dy, weight.b());
    beside(dy, weight.shape()[0], weight.ranks, product)
}

/// Writes `dx [T,in] = dy~ W~[.., ..in]`, with `ds` beside `dy [T, out + R]`.
///
/// # Errors
/// If the shapes do not fit together; the first failure of the GPU.
pub fn backward(dy: View<'_>, weight: &Weight<'_>, dx: ViewMut<'_>) -> Result<()> {
    let [out, inputs] = weight.shape();
    let dy = dy.columns(0..out + weight.ranks);
    matmul::nn(dx, 0.0, 1.0, dy, weight.values.columns(0..inputs))
}

/// Lets `product` write the `ranks` columns of `matrix` behind the first `cols`, which it reads.
fn beside(
    matrix: ViewMut<'_>,
    cols: usize,
    ranks: usize,
    product: impl FnOnce(ViewMut<'_>, View<'_>) -> Result<()>,
) -> Result<()> {
    let least = [matrix.rows(), matrix.cols().max(cols + ranks)];
    check_shape(
        "augmented_linear",
        "a matrix with room",
        least,
        matrix.shape(),
    )?;
    let mut matrix = matrix.columns(0..cols + ranks);
    if let Some([left, right]) = matrix.reborrow().columns_on_gpu(cols) {
        return product(right, left.as_view());
    }
    let mut made = Tensor::empty(&Device::Cpu, matrix.dtype(), matrix.rows(), ranks);
    product(made.view_mut(), matrix.as_view().columns(0..cols))?;
    copy(matrix.columns(cols..cols + ranks), made.view())
}

/// Copies a narrow matrix, out of a wide one or into one.
///
/// # Errors
/// If the shapes differ; the first failure of the GPU.
pub fn copy(mut to: ViewMut<'_>, from: View<'_>) -> Result<()> {
    const OP: &str = "augmented_linear::copy";
    check_shape(OP, "from", to.shape(), from.shape())?;
    if let Some(device) = common(OP, &[to.device(), from.device()])?.cloned() {
        return cuda::copy(&device, &mut to, from);
    }
    with_dtype!(to.dtype(), T => with_dtype!(from.dtype(), F => cpu::copy(typed_mut::<T>(to), typed::<F>(from))));
    Ok(())
}
