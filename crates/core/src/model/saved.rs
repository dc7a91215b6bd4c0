//! The activations that a layer holds between its forward and its backward.

use super::keep::Keep;
use super::linear::{PartSaved, Scaled};
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
        let dx = d_stream.view_mut().columns(0..self.x.cols());
        let statistics = self.statistics.as_ref();
        norm.backward(run, grads, d_normed.view(), &self.x, statistics, dx)
    }

    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        [&mut self.x].into_iter().chain(&mut self.statistics)
    }

    pub(crate) fn release(self, workspace: &Workspace) {
        workspace.give(self.x);
        self.statistics.into_iter().for_each(|t| workspace.give(t));
    }
}

impl LayerSaved {
    /// Without what `keep` does not keep, which goes back to the pool.
    pub(crate) fn reduced_to(mut self, keep: Keep, run: &Run<'_>) -> Self {
        if keep != Keep::All
            && let Some(gate_up) = self.gate_up.take()
        {
            gate_up.release(run);
        }
        if keep == Keep::Input
            && let Some(attention) = self.attention.take()
        {
            attention.release(run);
        }
        self
    }

    /// What it has of the pool that grows with the rows, `[T, _]` each, in a fixed order. What a method of its own
    /// keeps, and adapters that share a pass, is not among it.
    pub(crate) fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self {
            input,
            attention,
            gate_up,
            down,
        } = self;
        let mut tensors = Vec::from_iter(input.tensors_mut());
        if let Some(attention) = attention {
            tensors.extend([
                &mut attention.qkv,
                &mut attention.attended,
                &mut attention.lse,
            ]);
            tensors.extend(parts_mut(&mut attention.qkv_parts));
            tensors.extend(parts_mut(&mut attention.o_parts));
            let output = attention.output.iter_mut();
            tensors.extend(output.flat_map(NormedOutput::tensors_mut));
            tensors.extend(attention.middle.tensors_mut());
        }
        if let Some(gate_up) = gate_up {
            tensors.push(&mut gate_up.values);
            tensors.extend(parts_mut(&mut gate_up.parts));
        }
        tensors.extend(parts_mut(&mut down.parts));
        let output = down.output.iter_mut();
        tensors.extend(output.flat_map(NormedOutput::tensors_mut));
        tensors
    }

    /// Gives everything back.
    pub(crate) fn release(self, run: &Run<'_>) {
        let Self { input, down, .. } = self.reduced_to(Keep::Input, run);
        input.release(run.workspace);
        release_parts(down.parts, run);
        if let Some(output) = down.output {
            output.release(run.workspace);
        }
    }
}

impl AttentionSaved {
    fn release(self, run: &Run<'_>) {
        run.give([self.qkv, self.attended, self.lse]);
        release_parts(self.qkv_parts, run);
        release_parts(self.o_parts, run);
        if let Some(output) = self.output {
            output.release(run.workspace);
        }
        self.middle.release(run.workspace);
    }
}

impl GateUpSaved {
    fn release(self, run: &Run<'_>) {
        run.workspace.give(self.values);
        release_parts(self.parts, run);
    }
}

fn parts_mut(parts: &mut [PartSaved]) -> impl Iterator<Item = &mut Tensor> {
    parts.iter_mut().flat_map(|part| match part {
        PartSaved::LowRank { s, scaled } => {
            let scaled = scaled.as_mut().map(|scaled| &mut scaled.u);
            [Some(s), scaled].into_iter().flatten()
        }
        PartSaved::Factors { s, .. } | PartSaved::Augmented { s } => {
            [Some(s), None].into_iter().flatten()
        }
        PartSaved::None | PartSaved::Custom(_) | PartSaved::Members(_) => {
            [None, None].into_iter().flatten()
        }
    })
}

fn release_parts(parts: Vec<PartSaved>, run: &Run<'_>) {
    for part in parts {
        match part {
            PartSaved::LowRank { s, scaled } => {
                run.give([s]);
                if let Some(Scaled { u, norms }) = scaled {
                    run.give([u]);
                    run.give_fixed([norms]);
                }
            }
            // A method of its own allocates for itself: the pool would grow by it in every pass.
            PartSaved::Factors { s, .. } | PartSaved::Augmented { s } => run.give([s]),
            PartSaved::None | PartSaved::Custom(_) => {}
            PartSaved::Members(parts) => {
                for (part, member) in parts.into_iter().zip(&run.members) {
                    release_parts(vec![part], &member.run);
                }
            }
        }
    }
}
