//! The activations that a layer holds between its forward and its backward.

use super::keep::Keep;
use super::linear::PartSaved;
use ferrotune_kernels::{Tensor, Workspace};

/// What a layer keeps for its backward. What is `None` is computed again there.
pub(crate) struct LayerSaved {
    /// Residual stream before the attention block, `[T, D]`, and its norm's statistics.
    pub(crate) input: Tensor,
    pub(crate) input_rstd: Tensor,
    pub(crate) attention: Option<AttentionSaved>,
    pub(crate) gate_up: Option<GateUpSaved>,
    pub(crate) down_parts: Vec<PartSaved>,
}

/// Activations of the attention block.
pub(crate) struct AttentionSaved {
    /// q, k, v after RoPE, `[T, (H + 2 K) E]`; with norms of q and k, before those.
    pub(crate) qkv: Tensor,
    pub(crate) qkv_parts: Vec<PartSaved>,
    /// `[T, H E]`, and log-sum-exp `[T, H]`.
    pub(crate) attended: Tensor,
    pub(crate) lse: Tensor,
    pub(crate) o_parts: Vec<PartSaved>,
    /// Residual stream before the mlp, `[T, D]`, and its norm's statistics.
    pub(crate) middle: Tensor,
    pub(crate) middle_rstd: Tensor,
}

/// gate and up, `[T, 2 F]`.
pub(crate) struct GateUpSaved {
    pub(crate) values: Tensor,
    pub(crate) parts: Vec<PartSaved>,
}

impl LayerSaved {
    /// Without what `keep` does not keep, which goes back to the pool.
    pub(crate) fn reduced_to(mut self, keep: Keep, workspace: &Workspace) -> Self {
        if keep != Keep::All
            && let Some(gate_up) = self.gate_up.take()
        {
            gate_up.release(workspace);
        }
        if keep == Keep::Input
            && let Some(attention) = self.attention.take()
        {
            attention.release(workspace);
        }
        self
    }

    /// Gives everything back.
    pub(crate) fn release(self, workspace: &Workspace) {
        let Self {
            input,
            input_rstd,
            down_parts,
            ..
        } = self.reduced_to(Keep::Input, workspace);
        workspace.give(input);
        workspace.give(input_rstd);
        release_parts(down_parts, workspace);
    }
}

impl AttentionSaved {
    fn release(self, workspace: &Workspace) {
        let tensors = [
            self.qkv,
            self.attended,
            self.lse,
            self.middle,
            self.middle_rstd,
        ];
        tensors.into_iter().for_each(|t| workspace.give(t));
        release_parts(self.qkv_parts, workspace);
        release_parts(self.o_parts, workspace);
    }
}

impl GateUpSaved {
    fn release(self, workspace: &Workspace) {
        workspace.give(self.values);
        release_parts(self.parts, workspace);
    }
}

fn release_parts(parts: Vec<PartSaved>, workspace: &Workspace) {
    for part in parts {
        match part {
            PartSaved::LowRank { s, scaled } => {
                workspace.give(s);
                for tensor in scaled
                    .into_iter()
                    .flat_map(|scaled| [scaled.u, scaled.norms])
                {
                    workspace.give(tensor);
                }
            }
            // A method of its own allocates for itself: the pool would grow by it in every pass.
            PartSaved::Factors { s, .. } => workspace.give(s),
            PartSaved::None | PartSaved::Custom(_) => {}
        }
    }
}
