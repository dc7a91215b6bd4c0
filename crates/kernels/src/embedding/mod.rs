//! Rows of a table by token id.
//!
//! ```text
//! out[t,d] = table[ids[t], d]
//! d_table[ids[t], d] += d_out[t,d]
//! ```
//!
//! T is the number of tokens, D the hidden size, V the number of rows of the table. The sum over
//! equal ids runs in token order: the same bits for any number of threads.

mod cpu;
#[cfg(test)]
mod tests;

use crate::error::{check_len, check_shape};
use crate::row_blocks::{typed, typed_mut};
use crate::tensor::with_dtype;
use crate::{Error, Result, View, ViewMut};

/// Copies row `ids[t]` of `table [V, D]` to row `t` of `out [T, D]` (each f32 or bf16).
///
/// # Errors
/// If a shape differs or an id is not below V; `out` is then untouched.
pub fn forward(table: View<'_>, ids: &[u32], out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "embedding::forward";
    check_shape(OP, "out", [ids.len(), table.cols()], out.shape())?;
    check_ids(OP, ids, table.rows())?;
    with_dtype!(table.dtype(), X => with_dtype!(out.dtype(), Y =>
        cpu::forward::<X, Y>(typed(table), ids, typed_mut(out))
    ));
    Ok(())
}

/// Adds row `t` of `d_out [T, D]` (f32 or bf16) to row `ids[t]` of `d_table [V * D]`.
///
/// # Errors
/// If a length is not as stated or an id is not below V; `d_table` is then untouched.
pub fn backward(d_out: View<'_>, ids: &[u32], d_table: &mut [f32]) -> Result<()> {
    const OP: &str = "embedding::backward";
    let cols = d_out.cols();
    check_len(OP, "ids", d_out.rows(), ids.len())?;
    if cols == 0 {
        return check_len(OP, "d_table", 0, d_table.len());
    }
    let vocab = d_table.len() / cols;
    check_len(OP, "d_table", vocab * cols, d_table.len())?;
    check_ids(OP, ids, vocab)?;
    with_dtype!(d_out.dtype(), G => cpu::backward::<G>(typed(d_out), ids, d_table));
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
