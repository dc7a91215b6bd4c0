//! The activations of MLPs, gated (SwiGLU and GeGLU) and plain.
//!
//! ```text
//! out    = act(gate) * up             out = act(x)
//! d_gate = d_out * up * act'(gate)    dx  = d_out * act'(x)
//! d_up   = d_out * act(gate)
//!
//! act(g) = g * p(g),  act'(g) = p(g) + g * p'(g)
//! silu       p(g) = s(g),       p'(g) = s(g) (1 - s(g)),  s(x) = 1 / (1 + e^-x)
//! gelu       p(g) = (1 + erf(g / sqrt 2)) / 2,  p'(g) = e^(-g^2 / 2) / sqrt(2 pi)
//! gelu tanh  p(g) = (1 + tanh u) / 2 = s(2 u),  u(g) = sqrt(2 / pi) (g + 0.044715 g^3)
//! quick gelu p(g) = s(1.702 g)
//! relu       p(g) = 1 for g > 0, else 0;  act'(0) = 0
//! ```
//!
//! Gate and up are the left and right halves of one matrix `[T, 2F]`, as one GEMM writes them.
//! Data is f32 or bf16, each argument its own; arithmetic is f32.
//!
//! # Source
//! Shazeer: "GLU Variants Improve Transformer" (2020), SwiGLU and GEGLU without bias; Hendrycks, Gimpel:
//! "Gaussian Error Linear Units" (2016), with its approximation by tanh.

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
use crate::{Device, Result, Tensor, View, ViewMut};

/// What is applied to the gate, or to all there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `g / (1 + e^-g)`; with a gate, SwiGLU.
    Silu,
    /// `g` times the normal distribution's share below `g`; with a gate, GeGLU.
    Gelu,
    /// The approximation of it by tanh.
    GeluTanh,
    /// The approximation of it by `g / (1 + e^(-1.702 g))`.
    QuickGelu,
    /// `max(g, 0)`.
    Relu,
}

/// Writes `act(gate) * up` of `gate_up [T, 2F]` (gate, then up) to `out [T, F]`.
///
/// # Errors
/// If `gate_up` has not as many rows as `out` and twice its columns.
pub fn forward_gated(activation: Activation, gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "activation::forward_gated";
    check_shape(OP, "gate_up", beside_gate(out.as_view()), gate_up.shape())?;
    if let Some(device) = common(OP, &[gate_up.device(), out.device()])? {
        return cuda::launch(
            device,
            "gated",
            "forward",
            activation,
            [gate_up, out.as_view()],
            false,
        );
    }
    with_dtype!(gate_up.dtype(), X => with_dtype!(out.dtype(), Y =>
        cpu::forward_gated::<X, Y>(activation, typed(gate_up), typed_mut(out))
    ));
    Ok(())
}

/// Replaces the values of `gate_up [T, 2F]` by their gradients, given `d_out [T, F]`.
///
/// # Errors
/// If `gate_up` has not as many rows as `d_out` and twice its columns.
pub fn backward_gated_in_place(
    activation: Activation,
    gate_up: ViewMut<'_>,
    d_out: View<'_>,
) -> Result<()> {
    const OP: &str = "activation::backward_gated_in_place";
    check_shape(OP, "gate_up", beside_gate(d_out), gate_up.shape())?;
    if backward_on_gpu(OP, "gated", activation, [gate_up.as_view(), d_out], false)? {
        return Ok(());
    }
    with_dtype!(gate_up.dtype(), X => with_dtype!(d_out.dtype(), G =>
        cpu::backward_gated_in_place::<X, G>(activation, typed_mut(gate_up), typed(d_out))
    ));
    Ok(())
}

/// Writes `act(x)` of `x [T, F]` to `out [T, F]`.
///
/// # Errors
/// If the shapes differ.
pub fn forward(activation: Activation, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "activation::forward";
    check_shape(OP, "out", x.shape(), out.shape())?;
    if let Some(device) = common(OP, &[x.device(), out.device()])? {
        let matrices = [x, out.as_view()];
        return cuda::launch(device, "plain", "forward", activation, matrices, false);
    }
    with_dtype!(x.dtype(), X => with_dtype!(out.dtype(), Y =>
        cpu::forward::<X, Y>(activation, typed(x), typed_mut(out))
    ));
    Ok(())
}

/// Replaces the values of `x [T, F]` by their gradients, given `d_out [T, F]`.
///
/// # Errors
/// If the shapes differ.
pub fn backward_in_place(activation: Activation, x: ViewMut<'_>, d_out: View<'_>) -> Result<()> {
    const OP: &str = "activation::backward_in_place";
    check_shape(OP, "d_out", x.shape(), d_out.shape())?;
    if backward_on_gpu(OP, "plain", activation, [x.as_view(), d_out], false)? {
        return Ok(());
    }
    with_dtype!(x.dtype(), X => with_dtype!(d_out.dtype(), G =>
        cpu::backward_in_place::<X, G>(activation, typed_mut(x), typed(d_out))
    ));
    Ok(())
}

/// [`backward_gated_in_place`] that leaves `act(gate) * up` in the place of `d_out`: who needs it once more does not
/// compute it again.
///
/// # Errors
/// As there.
pub fn backward_gated_swapped(
    activation: Activation,
    gate_up: ViewMut<'_>,
    d_out: ViewMut<'_>,
) -> Result<()> {
    const OP: &str = "activation::backward_gated_swapped";
    check_shape(OP, "gate_up", beside_gate(d_out.as_view()), gate_up.shape())?;
    let matrices = [gate_up.as_view(), d_out.as_view()];
    if backward_on_gpu(OP, "gated", activation, matrices, true)? {
        return Ok(());
    }
    let mut out = Tensor::empty(&Device::Cpu, d_out.dtype(), d_out.rows(), d_out.cols());
    forward_gated(activation, gate_up.as_view(), out.view_mut())?;
    backward_gated_in_place(activation, gate_up, d_out.as_view())?;
    d_out.copy_from(out.view());
    Ok(())
}

/// [`backward_in_place`] that leaves `act(x)` in the place of `d_out`.
///
/// # Errors
/// As there.
pub fn backward_swapped(activation: Activation, x: ViewMut<'_>, d_out: ViewMut<'_>) -> Result<()> {
    const OP: &str = "activation::backward_swapped";
    check_shape(OP, "d_out", x.shape(), d_out.shape())?;
    if backward_on_gpu(
        OP,
        "plain",
        activation,
        [x.as_view(), d_out.as_view()],
        true,
    )? {
        return Ok(());
    }
    let mut out = Tensor::empty(&Device::Cpu, d_out.dtype(), d_out.rows(), d_out.cols());
    forward(activation, x.as_view(), out.view_mut())?;
    backward_in_place(activation, x, d_out.as_view())?;
    d_out.copy_from(out.view());
    Ok(())
}

/// The shape of gate and up side by side, by that of what they make.
fn beside_gate(out: View<'_>) -> [usize; 2] {
    [out.rows(), 2 * out.cols()]
}

/// The backward pass of a `kind`, if a GPU holds the matrices; false if the host does. With `keep` the activation's output
/// takes the place of its gradient.
fn backward_on_gpu(
    op: &'static str,
    kind: &str,
    activation: Activation,
    matrices: [View<'_>; 2],
    keep: bool,
) -> Result<bool> {
    let Some(device) = common(op, &matrices.map(|m| m.device()))? else {
        return Ok(false);
    };
    cuda::launch(
        device,
        kind,
        "backward_in_place",
        activation,
        matrices,
        keep,
    )?;
    Ok(true)
}
