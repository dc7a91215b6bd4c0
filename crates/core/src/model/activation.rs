//! What an mlp does between its projections.

use crate::Result;
use ferrotune_kernels::activation::{self, Activation as Function};
use ferrotune_kernels::{View, ViewMut};

/// A function of what is projected up, or of a gate beside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Activation {
    pub(crate) function: Function,
    /// Whether gate and up stand side by side, or up alone.
    pub(crate) gated: bool,
}

impl Activation {
    /// `out [T, F]` of `gate_up [T, 2 F]`, or of up alone `[T, F]`.
    pub(crate) fn forward(self, gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
        match self.gated {
            true => activation::forward_gated(self.function, gate_up, out)?,
            false => activation::forward(self.function, gate_up, out)?,
        }
        Ok(())
    }

    /// The same backward, with `act(gate) up` in the place of `d_out`.
    pub(crate) fn backward_swapped(self, gate_up: ViewMut<'_>, d_out: ViewMut<'_>) -> Result<()> {
        match self.gated {
            true => activation::backward_gated_swapped(self.function, gate_up, d_out)?,
            false => activation::backward_swapped(self.function, gate_up, d_out)?,
        }
        Ok(())
    }

    /// Replaces the values of `gate_up` by their gradients, given `d_out [T, F]`.
    pub(crate) fn backward_in_place(self, gate_up: ViewMut<'_>, d_out: View<'_>) -> Result<()> {
        match self.gated {
            true => activation::backward_gated_in_place(self.function, gate_up, d_out)?,
            false => activation::backward_in_place(self.function, gate_up, d_out)?,
        }
        Ok(())
    }
}
