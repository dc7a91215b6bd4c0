//! The gated activation of the Llama MLP.
//!
//! ```text
//! out    = silu(gate) * up,  silu(g) = g / (1 + e^-g)
//! d_gate = d_out * up * s * (1 + gate * (1 - s)),  s = 1 / (1 + e^-gate)
//! d_up   = d_out * silu(gate)
//! ```
//!
//! Gate and up are the left and right halves of one matrix `[T, 2F]`, as one GEMM writes them.
//! Data is f32 or bf16, each argument its own; arithmetic is f32.
//!
//! # Source
//! Shazeer: "GLU Variants Improve Transformer" (2020), SwiGLU without bias.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::device::common;
use crate::error::check_shape;
use crate::row_blocks::{typed, typed_mut};
use crate::tensor::with_dtype;
use crate::{Result, View, ViewMut};

/// Writes `silu(gate) * up` of `gate_up [T, 2F]` (gate, then up) to `out [T, F]`.
///
/// # Errors
/// If `gate_up` has not as many rows as `out` and twice its columns.
pub fn forward(gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "swiglu::forward";
    let expected = [out.rows(), 2 * out.cols()];
    check_shape(OP, "gate_up", expected, gate_up.shape())?;
    if let Some(device) = common(OP, &[gate_up.device(), out.device()])? {
        return cuda::forward(device, gate_up, out);
    }
    with_dtype!(gate_up.dtype(), X => with_dtype!(out.dtype(), Y =>
        cpu::forward::<X, Y>(typed(gate_up), typed_mut(out))
    ));
    Ok(())
}

/// Replaces the values of `gate_up [T, 2F]` by their gradients, given `d_out [T, F]`.
///
/// # Errors
/// If `gate_up` has not as many rows as `d_out` and twice its columns.
pub fn backward_in_place(gate_up: ViewMut<'_>, d_out: View<'_>) -> Result<()> {
    const OP: &str = "swiglu::backward_in_place";
    let expected = [d_out.rows(), 2 * d_out.cols()];
    check_shape(OP, "gate_up", expected, gate_up.shape())?;
    if let Some(device) = common(OP, &[gate_up.device(), d_out.device()])? {
        return cuda::backward_in_place(device, gate_up, d_out);
    }
    with_dtype!(gate_up.dtype(), X => with_dtype!(d_out.dtype(), G =>
        cpu::backward_in_place::<X, G>(typed_mut(gate_up), typed(d_out))
    ));
    Ok(())
}
