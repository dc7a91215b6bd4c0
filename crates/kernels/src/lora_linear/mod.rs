//! The low-rank part of a linear layer: `y += scale * dropout(x) A^T B^T`.
//!
//! ```text
//! x~ = dropout(x)          s = x~ A^T            y += scale * s B^T
//! ds = scale * dy B        dA += ds^T x~         dB += scale * dy^T s        dx += dropout(ds A)
//! ```
//!
//! Where an update is silent in some rows, these rows of `s` and `ds` are zero.
//!
//! Shapes: `x [T,in]`, `A [R,in]`, `B [out,R]`, `s [T,R]`, `y [T,out]`. `x`, `y` and their gradients
//! are f32 or bf16; `A`, `B` and `s` have one dtype, f32 on a CPU; the gradients of `A` and `B` are
//! f32. A matrix `[T,in]` is only allocated with dropout, from the workspace.
//!
//! # Source
//! Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models" (2021); initialisation and the
//! place of the dropout as in PEFT's `lora.Linear`.

#[cfg(test)]
mod tests;

use crate::error::{check_dtype, check_shape};
use crate::{Indices, Result, View, ViewMut, Workspace, dropout, embedding, matmul};

/// The two factors of a low-rank update and how they are applied.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// The down projection `A [R, in]`.
    pub a: View<'a>,
    /// The up projection `B [out, R]`.
    pub b: View<'a>,
    /// Factor of the product, `alpha / R` for plain LoRA.
    pub scale: f32,
    /// Dropout on `x`: the key of the mask, and what its words are drawn for `[2 T + 1]`, as
    /// [`dropout::forward`] takes it.
    pub dropout: Option<(dropout::Key, &'a Indices<'a>)>,
    /// Rows without the update, marked by 1 among zeros `[T]`, and a row of zeros `[1,R]`.
    pub silent: Option<(&'a Indices<'a>, View<'a>)>,
}

impl LowRank<'_> {
    fn rank(&self) -> usize {
        self.a.rows()
    }

    /// Refuses factors that do not fit `x [T,in]`, `y [T,out]` and `s [T,R]`.
    fn check(&self, op: &'static str, x: View<'_>, y: [usize; 2], s: View<'_>) -> Result<()> {
        let [tokens, inputs] = x.shape();
        check_shape(op, "A [R,in]", [self.rank(), inputs], self.a.shape())?;
        check_shape(op, "B [out,R]", [y[1], self.rank()], self.b.shape())?;
        check_shape(op, "y [T,out]", [tokens, y[1]], y)?;
        check_shape(op, "s [T,R]", [tokens, self.rank()], s.shape())?;
        check_dtype(op, "B", self.a.dtype(), self.b.dtype())?;
        check_dtype(op, "s", self.a.dtype(), s.dtype())
    }
}

/// Adds `scale * dropout(x) A^T B^T` to `y [T,out]` and writes `s [T,R] = dropout(x) A^T`, which
/// [`backward`] needs.
///
/// # Errors
/// If a shape or dtype does not fit, or the dropout probability is not in `[0, 1]`.
pub fn forward(
    x: View<'_>,
    low_rank: &LowRank<'_>,
    y: ViewMut<'_>,
    mut s: ViewMut<'_>,
    workspace: &Workspace,
) -> Result<()> {
    low_rank.check("lora_linear::forward", x, y.shape(), s.as_view())?;
    down(x, low_rank, s.reborrow(), workspace)?;
    matmul::nt(y, 1.0, low_rank.scale, s.as_view(), low_rank.b)
}

/// The first half of [`forward`]: writes `s [T,R] = dropout(x) A^T`.
///
/// # Errors
/// If a shape or dtype does not fit, or the dropout probability is not in `[0, 1]`.
pub fn down(
    x: View<'_>,
    low_rank: &LowRank<'_>,
    mut s: ViewMut<'_>,
    workspace: &Workspace,
) -> Result<()> {
    with_dropped(x, low_rank, workspace, |x| {
        matmul::nt(s.reborrow(), 0.0, 1.0, x, low_rank.a)
    })?;
    low_rank.silence(s)
}

/// Adds the gradients of `A` to `d_a [R,in]`, of `B` to `d_b [out,R]` and, if asked for, of `x` to
/// `dx [T,in]`.
///
/// `x`, `low_rank` and `s` are those of [`forward`]; `dy [T,out]` is the gradient of `y`.
///
/// # Errors
/// If a shape, length or dtype does not fit, or the dropout probability is not in `[0, 1]`.
#[expect(clippy::too_many_arguments, reason = "two inputs, three gradients")]
pub fn backward(
    x: View<'_>,
    low_rank: &LowRank<'_>,
    s: View<'_>,
    dy: View<'_>,
    dx: Option<ViewMut<'_>>,
    d_a: ViewMut<'_>,
    d_b: ViewMut<'_>,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "lora_linear::backward";
    low_rank.check(OP, x, dy.shape(), s)?;
    check_shape(OP, "d_a [R,in]", low_rank.a.shape(), d_a.shape())?;
    check_shape(OP, "d_b [out,R]", low_rank.b.shape(), d_b.shape())?;
    if let Some(dx) = &dx {
        check_shape(OP, "dx [T,in]", x.shape(), dx.shape())?;
    }

    matmul::tn(d_b, 1.0, low_rank.scale, dy, s)?;
    let rank = low_rank.rank();
    // Rows of any other pitch would keep a GPU from moving 16 bytes at a time.
    let mut wide = workspace.take(s.dtype(), x.rows(), Workspace::aligned(s.dtype(), rank));
    let ds = wide.view_mut().columns(0..rank);
    matmul::nn(ds, 0.0, low_rank.scale, dy, low_rank.b)?;
    low_rank.silence(wide.view_mut().columns(0..rank))?;
    down_backward(
        x,
        low_rank,
        wide.view().columns(0..rank),
        dx,
        d_a,
        workspace,
    )?;
    workspace.give(wide);
    Ok(())
}

/// Backward of [`down`]: adds `ds^T dropout(x)` to `d_a [R,in]` and, if asked for, `dropout(ds A)` to
/// `dx [T,in]`; `ds [T,R]` is the gradient of `s`.
///
/// # Errors
/// If a shape or dtype does not fit, or the dropout probability is not in `[0, 1]`.
pub fn down_backward(
    x: View<'_>,
    low_rank: &LowRank<'_>,
    ds: View<'_>,
    dx: Option<ViewMut<'_>>,
    d_a: ViewMut<'_>,
    workspace: &Workspace,
) -> Result<()> {
    with_dropped(x, low_rank, workspace, |x| matmul::tn(d_a, 1.0, 1.0, ds, x))?;
    match dx {
        Some(dx) => add_input_gradient(dx, low_rank, ds, workspace),
        None => Ok(()),
    }
}

/// `dx += dropout(ds A)`.
fn add_input_gradient(
    dx: ViewMut<'_>,
    low_rank: &LowRank<'_>,
    ds: View<'_>,
    workspace: &Workspace,
) -> Result<()> {
    let Some((key, rows)) = low_rank.active_dropout() else {
        return matmul::nn(dx, 1.0, 1.0, ds, low_rank.a);
    };
    let mut d_dropped = workspace.take(dx.dtype(), dx.rows(), dx.cols());
    matmul::nn(d_dropped.view_mut(), 0.0, 1.0, ds, low_rank.a)?;
    dropout::add_masked(dx, d_dropped.view(), key, rows)?;
    workspace.give(d_dropped);
    Ok(())
}

impl<'a> LowRank<'a> {
    /// The dropout, unless it drops nothing.
    fn active_dropout(&self) -> Option<(dropout::Key, &'a Indices<'a>)> {
        self.dropout.filter(|(key, _)| key.p != 0.0)
    }

    /// Clears the rows of `s [T,R]` where the update is silent.
    ///
    /// # Errors
    /// If a shape or dtype does not fit; the first failure of the GPU.
    pub fn silence(&self, s: ViewMut<'_>) -> Result<()> {
        match self.silent {
            Some((rows, zeros)) => embedding::overlay(zeros, 1, rows, s),
            None => Ok(()),
        }
    }
}

/// Calls `body` with `dropout(x)`, which is `x` itself if nothing is dropped.
fn with_dropped(
    x: View<'_>,
    low_rank: &LowRank<'_>,
    workspace: &Workspace,
    body: impl FnOnce(View<'_>) -> Result<()>,
) -> Result<()> {
    let Some((key, rows)) = low_rank.active_dropout() else {
        return body(x);
    };
    let mut dropped = workspace.take(x.dtype(), x.rows(), x.cols());
    dropout::forward(x, key, rows, dropped.view_mut())?;
    body(dropped.view())?;
    workspace.give(dropped);
    Ok(())
}
