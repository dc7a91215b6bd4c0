//! The output projection and the cross-entropy of its logits, without ever holding all logits.
//!
//! ```text
//! z = hidden[row] head^T                       logits of one label row, [V]
//! loss    = logZ - z[target]                   logZ = ln sum_v exp z_v
//! entropy = logZ - sum_v p_v z_v               p = softmax(z)
//! d_hidden[row] = (p - onehot(target)) head    d_head += sum over rows (p - onehot)^T hidden[row]
//! ```
//!
//! Only the label rows are projected. They are taken in chunks whose length depends on V alone, of
//! at most 32 MiB of logits; a chunk is stored `[V, rows]`, so that the head is read as it lies and
//! every row is one lane of a vector. Losses are summed in f64 in row order: the bits do not depend
//! on the number of threads. Logits that are not finite give a loss that is not finite.
//!
//! Shapes: `hidden [T,D]`, `head [V,D]`, each f32 or bf16; `rows [N]` in `0..T`, `targets [N]` in
//! `0..V`. Gradients are those of the sum of the losses.
//!
//! # Source
//! The loss of `torch.nn.functional.cross_entropy(reduction="sum")`; chunking as in Wijmans et al.:
//! "Cut Your Losses in Large-Vocabulary Language Models" (2024), with the chunk's logits kept.

mod cpu;
mod softmax;
#[cfg(test)]
mod tests;

use crate::error::{check_len, check_shape};
use crate::{Error, Result, View, ViewMut, Workspace};
use std::ops::AddAssign;

/// What a set of label rows adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// Sum of the losses, in nats.
    pub loss: f64,
    /// Number of label rows.
    pub count: u64,
    /// Rows whose largest logit is the target's (the first of equal ones counts).
    pub correct: u64,
    /// Sum of the entropies of the predictions, in nats.
    pub entropy: f64,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.count += other.count;
        self.correct += other.correct;
        self.entropy += other.entropy;
    }
}

/// Sums of loss, accuracy and entropy over the label rows.
///
/// # Errors
/// If a shape or length does not fit, or a row or target lies outside its table.
pub fn forward(
    hidden: View<'_>,
    head: View<'_>,
    rows: &[u32],
    targets: &[u32],
    workspace: &Workspace,
) -> Result<Sums> {
    check("linear_cross_entropy::forward", hidden, head, rows, targets)?;
    cpu::run(hidden, head, rows, targets, None, workspace)
}

/// [`forward`], and the gradients of the sum of the losses.
///
/// `d_hidden [T,D]` is written, zero off the label rows. `d_head [V*D]` is added to; without it the
/// head is frozen and its gradient never computed.
///
/// # Errors
/// As [`forward`].
pub fn forward_backward(
    hidden: View<'_>,
    head: View<'_>,
    rows: &[u32],
    targets: &[u32],
    d_hidden: ViewMut<'_>,
    d_head: Option<&mut [f32]>,
    workspace: &Workspace,
) -> Result<Sums> {
    const OP: &str = "linear_cross_entropy::forward_backward";
    check(OP, hidden, head, rows, targets)?;
    check_shape(OP, "d_hidden [T,D]", hidden.shape(), d_hidden.shape())?;
    if let Some(d_head) = &d_head {
        check_len(OP, "d_head [V*D]", head.rows() * head.cols(), d_head.len())?;
    }
    let gradients = cpu::Gradients { d_hidden, d_head };
    cpu::run(hidden, head, rows, targets, Some(gradients), workspace)
}

fn check(
    op: &'static str,
    hidden: View<'_>,
    head: View<'_>,
    rows: &[u32],
    targets: &[u32],
) -> Result<()> {
    let expected = [head.rows(), hidden.cols()];
    check_shape(op, "head [V,D]", expected, head.shape())?;
    check_len(op, "targets", rows.len(), targets.len())?;
    check_index(op, "rows", rows, hidden.rows())?;
    check_index(op, "targets", targets, head.rows())
}

fn check_index(op: &'static str, what: &'static str, values: &[u32], limit: usize) -> Result<()> {
    match values.iter().position(|&value| value as usize >= limit) {
        None => Ok(()),
        Some(at) => Err(Error::Index {
            op,
            what,
            at,
            index: values[at] as usize,
            limit,
        }),
    }
}
