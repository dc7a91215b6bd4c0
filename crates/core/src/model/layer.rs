//! One decoder layer, forward and backward, read top to bottom.
//!
//! Legend: T tokens, D hidden, F mlp width, H query heads, K kv heads, E head_dim.
//!
//! Saved for backward, per token: the two residual streams (2 D), q/k/v after RoPE ((H + 2 K) E),
//! the attention output (H E), gate and up (2 F), log-sum-exp (H) and two reciprocal standard
//! deviations. Normed inputs and `act(gate) up` are recomputed: that costs bandwidth, no product.

use super::linear::{LinearGroup, PartSaved};
use super::norm::{Norm, Normed};
use super::qk_norm::QkNorms;
use super::run::Run;
use crate::Result;
use crate::params::FlatBuffer;
use ferrotune_kernels::{DType, Tensor, attention, gated_activation};

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) input_norm: Norm,
    pub(crate) qkv: LinearGroup,
    pub(crate) qk_norms: Option<QkNorms>,
    pub(crate) o: LinearGroup,
    pub(crate) mlp_norm: Norm,
    pub(crate) gate_up: LinearGroup,
    pub(crate) activation: gated_activation::Activation,
    pub(crate) down: LinearGroup,
    pub(crate) attention: attention::Config,
    pub(crate) rotary_dim: usize,
}

/// What a layer keeps for its backward.
pub(crate) struct LayerSaved {
    /// Residual stream before the attention block, `[T, D]`, and its norm's statistics.
    input: Tensor,
    input_rstd: Tensor,
    /// q, k, v after RoPE, `[T, (H + 2 K) E]`; with norms of q and k, before those.
    qkv: Tensor,
    qkv_parts: Vec<PartSaved>,
    /// `[T, H E]`, and log-sum-exp `[T, H]`.
    attention: Tensor,
    lse: Tensor,
    o_parts: Vec<PartSaved>,
    /// Residual stream before the mlp, `[T, D]`, and its norm's statistics.
    middle: Tensor,
    middle_rstd: Tensor,
    /// `[T, 2 F]`.
    gate_up: Tensor,
    gate_up_parts: Vec<PartSaved>,
    down_parts: Vec<PartSaved>,
}

impl LayerSaved {
    /// All activations, and what the attachments kept.
    pub(crate) fn into_parts(self) -> ([Tensor; 8], impl Iterator<Item = PartSaved>) {
        let tensors = [
            self.input,
            self.input_rstd,
            self.qkv,
            self.attention,
            self.lse,
            self.middle,
            self.middle_rstd,
            self.gate_up,
        ];
        let parts = [
            self.qkv_parts,
            self.o_parts,
            self.gate_up_parts,
            self.down_parts,
        ];
        (tensors, parts.into_iter().flatten())
    }
}

impl Layer {
    /// From the residual stream and its norm to the next layer's, with what backward needs.
    pub(crate) fn forward(
        &self,
        run: &Run<'_>,
        input: Tensor,
        normed: Normed,
        next_norm: &Norm,
    ) -> Result<(Tensor, Normed, LayerSaved)> {
        let (workspace, dtype, tokens) = (run.workspace, run.dtype, run.tokens);
        let Normed {
            y,
            rstd: input_rstd,
        } = normed;

        let mut qkv = workspace.take(dtype, tokens, self.qkv.out_features());
        let qkv_parts = self.qkv.forward(run, y.view(), qkv.view_mut())?;
        workspace.give(y);
        let positioned = self.position(run, &mut qkv)?;
        let mut attended = workspace.take(dtype, tokens, self.o.in_features);
        let mut lse = workspace.take(DType::F32, tokens, self.attention.heads);
        let [q, k, v] = self.split(&qkv, positioned.as_ref());
        attention::forward(
            &self.attention,
            q,
            k,
            v,
            &run.cu_seqlens,
            &run.cu_seqlens,
            attended.view_mut(),
            lse.view_mut(),
        )?;
        positioned.into_iter().for_each(|t| workspace.give(t));
        let mut middle = workspace.take(dtype, tokens, self.o.out_features());
        let o_parts = self.o.forward(run, attended.view(), middle.view_mut())?;
        let Normed {
            y,
            rstd: middle_rstd,
        } = self.mlp_norm.add_forward(run, &mut middle, &input)?;

        let mut gate_up = workspace.take(dtype, tokens, self.gate_up.out_features());
        let gate_up_parts = self.gate_up.forward(run, y.view(), gate_up.view_mut())?;
        workspace.give(y);
        let mut activated = workspace.take(dtype, tokens, self.down.in_features);
        gated_activation::forward(self.activation, gate_up.view(), activated.view_mut())?;
        let mut output = workspace.take(dtype, tokens, self.down.out_features());
        let down_parts = self
            .down
            .forward(run, activated.view(), output.view_mut())?;
        workspace.give(activated);
        let next = next_norm.add_forward(run, &mut output, &middle)?;

        let saved = LayerSaved {
            input,
            input_rstd,
            qkv,
            qkv_parts,
            attention: attended,
            lse,
            o_parts,
            middle,
            middle_rstd,
            gate_up,
            gate_up_parts,
            down_parts,
        };
        Ok((output, next, saved))
    }

    /// Turns `d_stream`, the gradient of the layer's output stream `[T, D]`, into that of its input.
    ///
    /// With `needs_input` false nothing before this layer is trained: the product that only feeds
    /// the input's gradient is left out, and `d_stream` is not complete afterwards.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        saved: LayerSaved,
        d_stream: &mut Tensor,
        needs_input: bool,
    ) -> Result<()> {
        let (workspace, dtype, tokens) = (run.workspace, run.dtype, run.tokens);
        let mut d_normed = workspace.take(dtype, tokens, self.gate_up.in_features);

        let mut gate_up = saved.gate_up;
        let mut activated = workspace.take(dtype, tokens, self.down.in_features);
        gated_activation::forward(self.activation, gate_up.view(), activated.view_mut())?;
        let mut d_activated = workspace.take(dtype, tokens, self.down.in_features);
        let dx = Some(d_activated.view_mut());
        self.down.backward(
            run,
            grads,
            activated.view(),
            saved.down_parts,
            d_stream.view(),
            dx,
        )?;
        workspace.give(activated);
        gated_activation::backward_in_place(
            self.activation,
            gate_up.view_mut(),
            d_activated.view(),
        )?;
        workspace.give(d_activated);
        let normed = self
            .mlp_norm
            .recompute(run, &saved.middle, &saved.middle_rstd)?;
        let dx = Some(d_normed.view_mut());
        self.gate_up.backward(
            run,
            grads,
            normed.view(),
            saved.gate_up_parts,
            gate_up.view(),
            dx,
        )?;
        workspace.give(normed);
        workspace.give(gate_up);
        self.mlp_norm.backward(
            run,
            grads,
            &d_normed,
            &saved.middle,
            &saved.middle_rstd,
            d_stream.view_mut(),
        )?;
        workspace.give(saved.middle);
        workspace.give(saved.middle_rstd);

        let mut d_attended = workspace.take(dtype, tokens, self.o.in_features);
        let dx = Some(d_attended.view_mut());
        self.o.backward(
            run,
            grads,
            saved.attention.view(),
            saved.o_parts,
            d_stream.view(),
            dx,
        )?;
        let mut d_qkv = workspace.take(dtype, tokens, self.qkv.out_features());
        let positioned = self.positioned(run, &saved.qkv)?;
        let [q, k, v] = self.split(&saved.qkv, positioned.as_ref());
        let (out, cu_seqlens) = (saved.attention.view(), &run.cu_seqlens);
        let d_out = d_attended.view();
        attention::backward(
            &self.attention,
            q,
            k,
            v,
            out,
            saved.lse.view(),
            cu_seqlens,
            d_out,
            d_qkv.view_mut(),
        )?;
        workspace.give(d_attended);
        workspace.give(saved.attention);
        workspace.give(saved.lse);
        positioned.into_iter().for_each(|t| workspace.give(t));
        self.position_backward(run, grads, &saved.qkv, &mut d_qkv)?;
        workspace.give(saved.qkv);
        let normed = self
            .input_norm
            .recompute(run, &saved.input, &saved.input_rstd)?;
        let needs_normed = needs_input || self.input_norm.trained();
        let dx = needs_normed.then(|| d_normed.view_mut());
        self.qkv
            .backward(run, grads, normed.view(), saved.qkv_parts, d_qkv.view(), dx)?;
        workspace.give(normed);
        workspace.give(d_qkv);
        if needs_normed {
            self.input_norm.backward(
                run,
                grads,
                &d_normed,
                &saved.input,
                &saved.input_rstd,
                d_stream.view_mut(),
            )?;
        }
        workspace.give(saved.input);
        workspace.give(saved.input_rstd);
        workspace.give(d_normed);
        Ok(())
    }

    /// Whether anything in this layer is trained.
    pub(crate) fn trained(&self) -> bool {
        self.input_norm.trained()
            || self.mlp_norm.trained()
            || self.qk_norms.as_ref().is_some_and(QkNorms::trained)
            || [&self.qkv, &self.o, &self.gate_up, &self.down]
                .iter()
                .any(|g| g.trained())
    }
}
