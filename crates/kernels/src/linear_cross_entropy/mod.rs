//! The output projection and the cross-entropy of its logits, without ever holding all logits.
//!
//! ```text
//! u = scale hidden[row] head^T                 logits of one label row, [V]
//! z = u, or with a softcap c: c tanh(u / c)
//! loss    = logZ - z[target]                   logZ = ln sum_v exp z_v
//!           + smoothing (z[target] - mean_v z_v)
//! entropy = logZ - sum_v p_v z_v               p = softmax(z)
//! d_u = (p - q) dz/du                          dz/du = 1, or with a softcap: 1 - (z / c)^2
//! d_hidden[row] = scale d_u head               d_head += scale sum over rows d_u^T hidden[row]
//! q = (1 - smoothing) onehot(target) + smoothing / V
//! ```
//!
//! Only the label rows are projected. They are taken in chunks whose length depends on V alone. On
//! the CPU a chunk has at most 32 MiB of logits and is stored `[V, rows]`, so that the head is read
//! as it lies and every row is one lane of a vector; on a GPU it has at most 512 MiB, stored
//! `[rows, V]`, and is enough for a large product. Losses are summed in f64 in an order that depends
//! on the shapes alone. Logits that are not finite give a loss that is not finite.
//!
//! [`PADDING`] at the end of `rows` and `targets` stands for no row: it adds nothing anywhere, so that
//! few numbers of rows need be planned for.
//!
//! The head may come in two pieces and with a low-rank update ([`Head`]); then d_head is what
//! [`HeadGradients`] asks for.
//!
//! Shapes: `hidden [T,D]`, `head [V,D]`, each f32 or bf16; `rows [N]` in `0..T`, `targets [N]` in
//! `0..V`. Gradients are those of the sum of the losses.
//!
//! # Source
//! The loss of `torch.nn.functional.cross_entropy(reduction="sum")`; chunking as in Wijmans et al.:
//! "Cut Your Losses in Large-Vocabulary Language Models" (2024), with the chunk's logits kept.

mod accumulator;
mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
mod head;
#[cfg(test)]
mod loss_tests;
mod softmax;
#[cfg(test)]
mod tests;

pub(crate) use accumulator::DeviceSums;
pub use accumulator::{Accumulator, Sums};
pub use head::{Head, HeadGradients, Update, UpdateGradients};

use crate::device::common;
use crate::error::{check_len, check_shape};
use crate::{DType, Error, Indices, Result, View, ViewMut, Workspace};

/// What stands in `rows` and `targets` for no row.
pub const PADDING: u32 = u32::MAX;

/// What the logits should say.
#[derive(Clone, Copy, Debug)]
pub struct Labels<'a> {
    /// Label rows, `[N]` in `0..T`.
    pub rows: &'a Indices<'a>,
    /// The token that each should give, `[N]` in `0..V`.
    pub targets: &'a Indices<'a>,
    /// Label smoothing: the share of the target's probability that is spread evenly over all tokens.
    pub smoothing: f32,
}

/// Adds loss, accuracy and entropy of the label rows to `sums`.
///
/// # Errors
/// If a shape or length does not fit, or a row or target lies outside its table; on a GPU also if
/// `hidden` and `head` differ in dtype.
pub fn forward<'a>(
    hidden: View<'_>,
    head: impl Into<Head<'a>>,
    labels: Labels<'_>,
    sums: &mut Accumulator,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "linear_cross_entropy::forward";
    let head = head.into();
    let count = check(OP, hidden, &head, labels)?;
    if let Some(device) = common(OP, &devices(hidden, &head, labels))? {
        return cuda::run(device, hidden, &head, labels, None, sums, workspace);
    }
    sums.add(cpu::run(hidden, &head, labels, count, None, workspace)?);
    Ok(())
}

/// [`forward`], and the gradients of the sum of the losses.
///
/// `d_hidden [T,D]` is written, zero off the label rows; it lacks what comes through the `s` of an
/// update. `d_head [V,D]` f32 is added to; without it the head is frozen and its gradient never computed.
///
/// # Errors
/// As [`forward`].
pub fn forward_backward<'a, 'b>(
    hidden: View<'_>,
    head: impl Into<Head<'a>>,
    labels: Labels<'_>,
    d_hidden: ViewMut<'b>,
    d_head: impl Into<HeadGradients<'b>>,
    sums: &mut Accumulator,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "linear_cross_entropy::forward_backward";
    let (head, d_head) = (head.into(), d_head.into());
    let count = check(OP, hidden, &head, labels)?;
    check_shape(OP, "d_hidden [T,D]", hidden.shape(), d_hidden.shape())?;
    d_head.check(OP, &head)?;
    let mut places = devices(hidden, &head, labels).to_vec();
    places.push(d_hidden.device());
    places.extend(d_head.weight.as_ref().map(ViewMut::device));
    places.extend(d_head.tail.as_ref().map(ViewMut::device));
    if let Some(update) = &d_head.update {
        places.extend([update.s.device(), update.b.device()]);
    }
    let gradients = Gradients { d_hidden, d_head };
    if let Some(device) = common(OP, &places)? {
        return cuda::run(
            device,
            hidden,
            &head,
            labels,
            Some(gradients),
            sums,
            workspace,
        );
    }
    sums.add(cpu::run(
        hidden,
        &head,
        labels,
        count,
        Some(gradients),
        workspace,
    )?);
    Ok(())
}

/// Bytes of scratch memory that a workspace holds after passes over these numbers of label rows, with a
/// `head` `[V, D]` of `dtype` on the CPU or a GPU.
#[must_use]
pub fn scratch_bytes(
    on_gpu: bool,
    dtype: DType,
    head: [usize; 2],
    label_rows: impl IntoIterator<Item = usize>,
) -> usize {
    let label_rows = label_rows.into_iter().filter(|&rows| rows > 0);
    if on_gpu {
        cuda::scratch_bytes(dtype, head, label_rows)
    } else {
        label_rows
            .take(1)
            .map(|_| cpu::scratch_bytes(head[0]))
            .sum()
    }
}

/// Where the gradients go.
struct Gradients<'a> {
    d_hidden: ViewMut<'a>,
    d_head: HeadGradients<'a>,
}

/// Where the operands of forward are.
fn devices<'a>(
    hidden: View<'a>,
    head: &Head<'a>,
    labels: Labels<'a>,
) -> [Option<&'a std::sync::Arc<crate::cuda::CudaDevice>>; 7] {
    let of = |view: Option<View<'a>>| view.unwrap_or(hidden).device();
    [
        hidden.device(),
        head.weight.device(),
        of(head.tail),
        of(head.update.map(|update| update.s)),
        of(head.update.map(|update| update.b)),
        labels.rows.device(),
        labels.targets.device(),
    ]
}

/// The number of rows before the padding.
fn check(op: &'static str, hidden: View<'_>, head: &Head<'_>, labels: Labels<'_>) -> Result<usize> {
    let Labels {
        rows,
        targets,
        smoothing,
    } = labels;
    if !(0.0..1.0).contains(&smoothing) {
        let message = format!("label smoothing is {smoothing}, expected 0 to below 1");
        return Err(Error::Invalid { op, message });
    }
    head.check(op, hidden)?;
    check_len(op, "targets", rows.len(), targets.len())?;
    let before_padding = |values: &[u32]| {
        let padding = values.iter().rev().take_while(|&&value| value == PADDING);
        values.len() - padding.count()
    };
    let labels = before_padding(rows);
    check_len(
        op,
        "targets before the padding",
        labels,
        before_padding(targets),
    )?;
    check_index(op, "rows", &rows[..labels], hidden.rows())?;
    check_index(op, "targets", &targets[..labels], head.vocabulary())?;
    Ok(labels)
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
