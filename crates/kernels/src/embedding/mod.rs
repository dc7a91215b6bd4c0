//! Rows of a table by token id.
//!
//! ```text
//! out[t,d] = table[ids[t], d]
//! d_table[ids[t], d] += d_out[t,d]
//! ```
//!
//! A table may also be a part of a larger one, from row `first` on ([`overlay`]): tokens of other rows are
//! then left alone.
//!
//! T is the number of tokens, D the hidden size, V the number of rows of the table. The sum over
//! equal ids runs in token order: the same bits for any number of threads.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::{check_len, check_shape};
use crate::row_blocks::{typed, typed_mut};
use crate::tensor::with_dtype;
use crate::{Error, Indices, Result, View, ViewMut};

/// Copies row `ids[t]` of `table [V, D]` to row `t` of `out [T, D]` (each f32 or bf16).
///
/// # Errors
/// If a shape differs or an id is not below V; `out` is then untouched.
pub fn forward(table: View<'_>, ids: &Indices<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "embedding::forward";
    check_shape(OP, "out", [ids.len(), table.cols()], out.shape())?;
    check_ids(OP, ids, table.rows())?;
    gather(OP, table, 0, ids, out)
}

/// Copies row `ids[t] - first` of `table [N, D]` to row `t` of `out [T, D]` (each f32 or bf16) for every
/// token whose id is not below `first`; the other rows of `out` stay as they are.
///
/// # Errors
/// If a shape differs or an id is not below `first + N`; `out` is then untouched.
pub fn overlay(table: View<'_>, first: usize, ids: &Indices<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "embedding::overlay";
    check_shape(OP, "out", [ids.len(), table.cols()], out.shape())?;
    check_ids(OP, ids, first + table.rows())?;
    gather(OP, table, first, ids, out)
}

fn gather(
    op: &'static str,
    table: View<'_>,
    first: usize,
    ids: &Indices<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    if let Some(device) = common(op, &[table.device(), ids.device(), out.device()])? {
        return cuda::forward(device, table, first, ids, out);
    }
    with_dtype!(table.dtype(), X => with_dtype!(out.dtype(), Y =>
        cpu::forward::<X, Y>(typed(table), first, ids, typed_mut(out))
    ));
    Ok(())
}

/// Adds row `t` of `d_out [T, D]` (f32 or bf16) to row `ids[t]` of `d_table [V, D]` f32.
///
/// # Errors
/// If a shape is not as stated or an id is not below V; `d_table` is then untouched.
pub fn backward(d_out: View<'_>, ids: &Indices<'_>, d_table: ViewMut<'_>) -> Result<()> {
    scatter_add("embedding::backward", d_out, 0, ids, d_table)
}

/// Backward of [`overlay`]: adds row `t` of `d_out [T, D]` (f32 or bf16) to row `ids[t] - first` of
/// `d_table [N, D]` f32 for every token whose id is not below `first`.
///
/// # Errors
/// If a shape is not as stated or an id is not below `first + N`; `d_table` is then untouched.
pub fn overlay_backward(
    d_out: View<'_>,
    first: usize,
    ids: &Indices<'_>,
    d_table: ViewMut<'_>,
) -> Result<()> {
    scatter_add("embedding::overlay_backward", d_out, first, ids, d_table)
}

fn scatter_add(
    op: &'static str,
    d_out: View<'_>,
    first: usize,
    ids: &Indices<'_>,
    d_table: ViewMut<'_>,
) -> Result<()> {
    check_len(op, "ids", d_out.rows(), ids.len())?;
    let expected = [d_table.rows(), d_out.cols()];
    check_shape(op, "d_table", expected, d_table.shape())?;
    check_ids(op, ids, first + d_table.rows())?;
    let d_table = d_table.dense_f32(op, "d_table")?;
    if let Some(device) = common(op, &[d_out.device(), ids.device(), d_table.device()])? {
        return cuda::backward(device, d_out, first, ids, d_table);
    }
    let d_table = d_table.contiguous(op, "d_table")?;
    with_dtype!(d_out.dtype(), G => cpu::backward::<G>(typed(d_out), first, ids, d_table));
    Ok(())
}

fn check_ids(op: &'static str, ids: &[u32], limit: usize) -> Result<()> {
    let bad = ids.iter().position(|&id| id as usize >= limit);
    bad.map_or(Ok(()), |at| {
        Err(Error::Index {
            op,
            what: "ids",
            at,
            index: ids[at] as usize,
            limit,
        })
    })
}
