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
use crate::{Result, View, ViewMut, matmul};

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

/// Writes `y [T,out] = x~ W~[..out, ..]^T` and, into the last R columns of `x [T, in + R]`, `s [T,R]`.
///
/// # Errors
/// If the shapes do not fit together; the first failure of the GPU.
pub fn forward(mut x: ViewMut<'_>, s: View<'_>, weight: &Weight<'_>, y: ViewMut<'_>) -> Result<()> {
    let [out, inputs] = weight.shape();
    beside(x.reborrow(), inputs, s, weight.ranks)?;
    let columns = 0..inputs + weight.ranks;
    matmul::nt(
        y,
        0.0,
        1.0,
        x.as_view().columns(columns),
        weight.values.row_range(0..out),
    )
}

/// Writes `dx [T,in] = dy~ W~[.., ..in]` and, into the last R columns of `dy [T, out + R]`, `ds [T,R]`.
///
/// # Errors
/// If the shapes do not fit together; the first failure of the GPU.
pub fn backward(
    mut dy: ViewMut<'_>,
    ds: View<'_>,
    weight: &Weight<'_>,
    dx: ViewMut<'_>,
) -> Result<()> {
    let [out, inputs] = weight.shape();
    beside(dy.reborrow(), out, ds, weight.ranks)?;
    let columns = 0..out + weight.ranks;
    matmul::nn(
        dx,
        0.0,
        1.0,
        dy.as_view().columns(columns),
        weight.values.columns(0..inputs),
    )
}

/// Copies `s [T,R]` behind the first `cols` columns of `matrix`, which may have more behind those.
fn beside(matrix: ViewMut<'_>, cols: usize, s: View<'_>, ranks: usize) -> Result<()> {
    const OP: &str = "augmented_linear::beside";
    check_shape(OP, "s [T,R]", [matrix.rows(), ranks], s.shape())?;
    let least = [matrix.rows(), matrix.cols().max(cols + ranks)];
    check_shape(OP, "a matrix with room for s", least, matrix.shape())?;
    let mut to = matrix.columns(cols..cols + ranks);
    if let Some(device) = common(OP, &[to.device(), s.device()])?.cloned() {
        return cuda::copy(&device, &mut to, s);
    }
    with_dtype!(to.dtype(), M => with_dtype!(s.dtype(), S => cpu::copy(typed_mut::<M>(to), typed::<S>(s))));
    Ok(())
}
