//! The activations that a layer holds between its forward and its backward.

use super::keep::Keep;
use super::linear::PartSaved;
use super::norm::Norm;
use super::residual::NormedOutput;
use super::run::Run;
use crate::Result;
use crate::params::FlatBuffer;
use ferrotune_kernels::{Tensor, Workspace};

/// What a layer keeps for its backward. What is `None` is computed again there.
pub(crate) struct LayerSaved {
    /// Before the attention block.
    pub(crate) input: Stream,
    pub(crate) attention: Option<AttentionSaved>,
    pub(crate) gate_up: Option<GateUpSaved>,
    pub(crate) down: DownSaved,
}

/// A residual stream `[T, D]`, and its norm's statistics where it has one.
pub(crate) struct Stream {
    pub(crate) x: Tensor,
    pub(crate) statistics: Option<Tensor>,
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
    pub(crate) output: Option<NormedOutput>,
    /// Before the mlp.
    pub(crate) middle: Stream,
}

/// gate and up, `[T, 2 F]`, or up alone.
pub(crate) struct GateUpSaved {
    pub(crate) values: Tensor,
    pub(crate) parts: Vec<PartSaved>,
}

/// Of the down projection, which is never computed again.
pub(crate) struct DownSaved {
    pub(crate) parts: Vec<PartSaved>,
    pub(crate) output: Option<NormedOutput>,
}

impl Stream {
    /// Its norm again.
    pub(crate) fn normed(&self, run: &Run<'_>, norm: &Norm) -> Result<Option<Tensor>> {
        norm.recompute(run, &self.x, self.statistics.as_ref())
    }

    /// Adds the gradient of the stream to `d_stream`, given that of its norm.
    pub(crate) fn norm_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        norm: &Norm,
        d_normed: &Tensor,
        d_stream: &mut Tensor,
    ) -> Result<()> {
        let (statistics, dx) = (self.statistics.as_ref(), d_stream.view_mut());
        norm.backward(run, grads, d_normed, &self.x, statistics, dx)
    }

    pub(crate) fn release(self, workspace: &Workspace) {
        workspace.give(self.x);
        self.statistics.into_iter().for_each(|t| workspace.give(t));
    }
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
        let Self { input, down, .. } = self.reduced_to(Keep::Input, workspace);
        input.release(workspace);
        release_parts(down.parts, workspace);
        if let Some(output) = down.output {
            output.release(workspace);
        }
    }
}

impl AttentionSaved {
    fn release(self, workspace: &Workspace) {
        for tensor in [self.qkv, self.attended, self.lse] {
            workspace.give(tensor);
        }
        release_parts(self.qkv_parts, workspace);
        release_parts(self.o_parts, workspace);
        if let Some(output) = self.output {
            output.release(workspace);
        }
        self.middle.release(workspace);
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
