//! Causal attention over packed sequences, with grouped heads and a sliding window.
//!
//! ```text
//! P[i,j] = exp(scale * q_i . k_j - lse_i)   for keys j that query i may see
//! lse_i  = ln sum_j exp(scale * q_i . k_j)
//! o_i    = sum_j P[i,j] v_j
//!
//! delta_i = do_i . o_i                      dS = P * (do v^T - delta) * scale
//! dq = dS k                                 dk = dS^T q      dv = P^T do
//! ```
//!
//! Sequence s owns the query rows `cu_q[s]..cu_q[s+1]` and the key rows `cu_k[s]..cu_k[s+1]`. Its
//! last query is aligned with its last key: with `n` queries and `m >= n` keys, query i sees the
//! keys up to `i + m - n`, with a window of w only the last w of those. Query head h reads key head
//! `h * kv_heads / heads`.
//!
//! Rows after the last sequence are padding: their outputs and gradients are zero, and they change no
//! bit of anything else.
//!
//! Keys outside the window or after the last query of a block of queries are never touched, and no
//! matrix longer than one block of queries is kept: the backward pass recomputes `P` from `lse`.
//!
//! With a softcap c the score `s = scale * q_i . k_j` is replaced by `c * tanh(s / c)`, and dS takes
//! the factor `1 - tanh(s / c)^2`.
//!
//! On a GPU a head is at most 256 wide. If every matrix is bf16 the products run on tensor cores, and
//! `P` and `dS` are rounded to bf16 for them. On compute capability 9.0 and with `FERROTUNE_ATTENTION=wgmma`
//! these are products of warpgroups, for heads of up to 64 and of 97 to 128; with `FERROTUNE_ATTENTION=tma` the
//! copy engine brings their tiles.
//!
//! # Source
//! Vaswani et al. (2017); Dao: "FlashAttention-2" (2023) for the backward from `lse`; Shah et al.:
//! "FlashAttention-3" (2024) for
//! products that are under way while the exponentials of the next tile are computed; grouped heads
//! and window as in transformers' Llama and Mistral; softcap as in its Gemma 2.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use cuda::with_each;

use crate::device::common;
use crate::error::{check_len, check_shape};
use crate::tensor::with_dtype;
use crate::{Error, Indices, Result, View, ViewMut, Workspace};

/// Heads and masks of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Number of query heads H.
    pub heads: usize,
    /// Number of key and value heads K; divides `heads`.
    pub kv_heads: usize,
    /// Width E of one head.
    pub head_dim: usize,
    /// Factor of the scores, positive, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Number of keys a query sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// Bound c of the scores, which become `c * tanh(score / c)`.
    pub softcap: Option<f32>,
}

/// Writes the output of every query to `out [Tq,H*E]` and its log-sum-exp to `lse [Tq,H]` f32, rows
/// back to back.
///
/// `q [Tq,H*E]`, `k [Tk,K*E]`, `v [Tk,K*E]` and `out` are each f32 or bf16; `cu_q` and `cu_k` are
/// the sequence bounds `[S+1]`. Sequences may be empty.
///
/// # Errors
/// If a shape or length does not fit, `kv_heads` does not divide `heads`, the window is zero, scale or
/// softcap are not positive, or the bounds do not grow from 0 to at most the number of rows with at
/// least as many keys as queries. On a GPU also if a head is wider than 256.
#[expect(
    clippy::too_many_arguments,
    reason = "three inputs with their bounds, two outputs"
)]
pub fn forward(
    config: &Config,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    cu_q: &Indices<'_>,
    cu_k: &Indices<'_>,
    out: ViewMut<'_>,
    lse: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "attention::forward";
    check_inputs(OP, config, q, k, v)?;
    check_bounds(OP, q.rows(), k.rows(), cu_q, cu_k)?;
    check_shape(OP, "out [Tq,H*E]", q.shape(), out.shape())?;
    check_shape(OP, "lse [Tq,H]", [q.rows(), config.heads], lse.shape())?;
    let lse = lse.dense_f32(OP, "lse")?;
    let devices = [
        q.device(),
        k.device(),
        v.device(),
        out.device(),
        lse.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        common(OP, &[Some(device), cu_q.device(), cu_k.device()])?;
        return cuda::forward(OP, device, config, [q, k, v], [cu_q, cu_k], out, lse);
    }
    let lse = lse.contiguous(OP, "lse")?;
    let inputs = cpu::Inputs { q, k, v };
    with_dtype!(out.dtype(), T => {
        if let Some(out) = out.typed::<T>() {
            cpu::forward::run(config, &inputs, cu_q, cu_k, out, lse);
        }
    });
    Ok(())
}

/// Writes the gradients of `q`, `k` and `v`, side by side, to `d_qkv [T,(H+2K)*E]`.
///
/// `q`, `k`, `v`, `out` and `lse` are those of [`forward`] with `cu_seqlens` for queries and keys
/// alike; `d_out [T,H*E]` is the gradient of `out`. Each matrix is f32 or bf16. On a GPU, sums of the
/// rows `[T,H]` f32 are taken from the workspace.
///
/// # Errors
/// As [`forward`].
#[expect(
    clippy::too_many_arguments,
    reason = "the forward pass, its gradient and the result"
)]
pub fn backward(
    config: &Config,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    out: View<'_>,
    lse: View<'_>,
    cu_seqlens: &Indices<'_>,
    d_out: View<'_>,
    d_qkv: ViewMut<'_>,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "attention::backward";
    check_inputs(OP, config, q, k, v)?;
    check_bounds(OP, q.rows(), k.rows(), cu_seqlens, cu_seqlens)?;
    check_shape(OP, "out [T,H*E]", q.shape(), out.shape())?;
    check_shape(OP, "d_out [T,H*E]", q.shape(), d_out.shape())?;
    check_shape(OP, "lse [T,H]", [q.rows(), config.heads], lse.shape())?;
    let width = (config.heads + 2 * config.kv_heads) * config.head_dim;
    check_shape(OP, "d_qkv [T,(H+2K)*E]", [q.rows(), width], d_qkv.shape())?;
    let lse = lse.dense_f32(OP, "lse")?;
    let devices = [
        q.device(),
        k.device(),
        v.device(),
        out.device(),
        lse.device(),
        d_out.device(),
        d_qkv.device(),
    ];
    if let Some(device) = common(OP, &devices)? {
        common(OP, &[Some(device), cu_seqlens.device()])?;
        let saved = cuda::Saved { out, lse, d_out };
        let inputs = [q, k, v];
        let gradient = (d_qkv, workspace);
        return cuda::backward(OP, device, config, inputs, &saved, cu_seqlens, gradient);
    }
    let lse = lse.contiguous(OP, "lse")?;
    let inputs = cpu::Inputs { q, k, v };
    let saved = cpu::backward::Saved { out, lse, d_out };
    with_dtype!(d_qkv.dtype(), T => {
        if let Some(d_qkv) = d_qkv.typed::<T>() {
            cpu::backward::run(config, &inputs, &saved, cu_seqlens, d_qkv);
        }
    });
    Ok(())
}

fn check_inputs(
    op: &'static str,
    config: &Config,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
) -> Result<()> {
    let Config {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *config;
    if head_dim == 0 || kv_heads == 0 || heads == 0 || heads % kv_heads != 0 {
        let message = format!(
            "{heads} query heads and {kv_heads} key heads of width {head_dim}; the number of query \
             heads must be a multiple of that of key heads, none of the three zero"
        );
        return Err(Error::Invalid { op, message });
    }
    if config.window == Some(0) {
        let message = "a window of 0 keys hides every key; a window counts the query itself".into();
        return Err(Error::Invalid { op, message });
    }
    for (what, factor) in [("scale", Some(config.scale)), ("softcap", config.softcap)] {
        if let Some(factor) = factor
            && !(factor > 0.0 && factor.is_finite())
        {
            let message = format!("a {what} of {factor}; it must be positive and finite");
            return Err(Error::Invalid { op, message });
        }
    }
    check_shape(op, "q [Tq,H*E]", [q.rows(), heads * head_dim], q.shape())?;
    check_shape(op, "k [Tk,K*E]", [k.rows(), kv_heads * head_dim], k.shape())?;
    check_shape(op, "v [Tk,K*E]", k.shape(), v.shape())
}

fn check_bounds(
    op: &'static str,
    queries: usize,
    keys: usize,
    cu_q: &[u32],
    cu_k: &[u32],
) -> Result<()> {
    check_len(op, "cu_k", cu_q.len(), cu_k.len())?;
    for (what, bounds, rows) in [("cu_q", cu_q, queries), ("cu_k", cu_k, keys)] {
        let complete = bounds.first() == Some(&0) && bounds.last() <= Some(&(rows as u32));
        if !complete || bounds.windows(2).any(|pair| pair[0] > pair[1]) {
            let message =
                format!("{what} is {bounds:?}, expected bounds that grow from 0 to at most {rows}");
            return Err(Error::Invalid { op, message });
        }
    }
    for (sequence, (q, k)) in cu_q.windows(2).zip(cu_k.windows(2)).enumerate() {
        let (queries, keys) = (q[1] - q[0], k[1] - k[0]);
        if queries > keys {
            let message = format!(
                "sequence {sequence} has {queries} queries but {keys} keys; the last query is the \
                 last key, so there must be at least as many keys"
            );
            return Err(Error::Invalid { op, message });
        }
    }
    Ok(())
}
