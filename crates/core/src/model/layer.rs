//! One decoder layer, forward and backward, read top to bottom.
//!
//! Legend: T tokens, D hidden, F mlp width, H query heads, K kv heads, E head_dim.
//!
//! Normed inputs and `act(gate) up` are never kept: to compute them again costs bandwidth and no
//! product. What else is kept depends on the layer's [`Keep`].

use super::keep::Keep;
use super::linear::{LinearGroup, PartSaved};
use super::norm::{Norm, Normed};
use super::qk_norm::QkNorms;
use super::run::Run;
use super::saved::{AttentionSaved, GateUpSaved, LayerSaved};
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
    /// 0 in a layer without positions.
    pub(crate) rotary_dim: usize,
}

impl Layer {
    /// From the residual stream and its norm to the next layer's, with what backward needs; with
    /// nothing of it where there is no backward, `keep` being `None`.
    pub(crate) fn forward(
        &self,
        run: &Run<'_>,
        input: Tensor,
        normed: Normed,
        next_norm: &Norm,
        keep: Option<Keep>,
    ) -> Result<(Tensor, Normed, Option<LayerSaved>)> {
        let (workspace, dtype, tokens) = (run.workspace, run.dtype, run.rows);
        let Normed {
            y,
            rstd: input_rstd,
        } = normed;
        let (attention, y) = self.attend(run, &input, y)?;
        let gate_up = self.gate_up(run, y)?;
        let mut activated = workspace.take(dtype, tokens, self.down.in_features);
        gated_activation::forward(self.activation, gate_up.values.view(), activated.view_mut())?;
        let mut output = workspace.take(dtype, tokens, self.down.out_features());
        let down_parts = self
            .down
            .forward(run, activated.view(), output.view_mut())?;
        workspace.give(activated);
        let next = next_norm.add_forward(run, &mut output, &attention.middle)?;

        let saved = LayerSaved {
            input,
            input_rstd,
            attention: Some(attention),
            gate_up: Some(gate_up),
            down_parts,
        };
        let saved = match keep {
            Some(keep) => Some(saved.reduced_to(keep, workspace)),
            None => {
                saved.release(workspace);
                None
            }
        };
        Ok((output, next, saved))
    }

    /// The attention block: from the input stream and its norm `y`, which is given back, to the
    /// stream before the mlp and its norm.
    fn attend(&self, run: &Run<'_>, input: &Tensor, y: Tensor) -> Result<(AttentionSaved, Tensor)> {
        let (workspace, dtype, tokens) = (run.workspace, run.dtype, run.rows);
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
            &run.inputs.cu_seqlens,
            &run.inputs.cu_seqlens,
            attended.view_mut(),
            lse.view_mut(),
        )?;
        positioned.into_iter().for_each(|t| workspace.give(t));
        let mut middle = workspace.take(dtype, tokens, self.o.out_features());
        let o_parts = self.o.forward(run, attended.view(), middle.view_mut())?;
        let Normed {
            y,
            rstd: middle_rstd,
        } = self.mlp_norm.add_forward(run, &mut middle, input)?;
        let saved = AttentionSaved {
            qkv,
            qkv_parts,
            attended,
            lse,
            o_parts,
            middle,
            middle_rstd,
        };
        Ok((saved, y))
    }

    /// gate and up of the normed stream `y`, which is given back.
    fn gate_up(&self, run: &Run<'_>, y: Tensor) -> Result<GateUpSaved> {
        let mut values = run
            .workspace
            .take(run.dtype, run.rows, self.gate_up.out_features());
        let parts = self.gate_up.forward(run, y.view(), values.view_mut())?;
        run.workspace.give(y);
        Ok(GateUpSaved { values, parts })
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
        let LayerSaved {
            input,
            input_rstd,
            attention,
            gate_up,
            down_parts,
        } = saved;
        let (attention, y) = match attention {
            Some(attention) => (attention, None),
            None => {
                let y = self.input_norm.recompute(run, &input, &input_rstd)?;
                let (attention, y) = self.attend(run, &input, y)?;
                (attention, Some(y))
            }
        };
        let gate_up = match (gate_up, y) {
            (Some(gate_up), _) => gate_up,
            (None, Some(y)) => self.gate_up(run, y)?,
            (None, None) => {
                let (middle, rstd) = (&attention.middle, &attention.middle_rstd);
                let y = self.mlp_norm.recompute(run, middle, rstd)?;
                self.gate_up(run, y)?
            }
        };
        self.mlp_backward(run, grads, &attention, gate_up, down_parts, d_stream)?;
        run.workspace.give(attention.middle);
        run.workspace.give(attention.middle_rstd);

        let mut d_attended = run.workspace.take(run.dtype, run.rows, self.o.in_features);
        let dx = Some(d_attended.view_mut());
        self.o.backward(
            run,
            grads,
            attention.attended.view(),
            attention.o_parts,
            d_stream.view(),
            dx,
        )?;
        let mut d_qkv = run
            .workspace
            .take(run.dtype, run.rows, self.qkv.out_features());
        let positioned = self.positioned(run, &attention.qkv)?;
        let [q, k, v] = self.split(&attention.qkv, positioned.as_ref());
        let (out, cu_seqlens) = (attention.attended.view(), &run.inputs.cu_seqlens);
        attention::backward(
            &self.attention,
            q,
            k,
            v,
            out,
            attention.lse.view(),
            cu_seqlens,
            d_attended.view(),
            d_qkv.view_mut(),
            run.workspace,
        )?;
        let used = [d_attended, attention.attended, attention.lse];
        used.into_iter()
            .chain(positioned)
            .for_each(|t| run.workspace.give(t));
        self.position_backward(run, grads, &attention.qkv, &mut d_qkv)?;
        run.workspace.give(attention.qkv);
        let stream = Stream {
            x: &input,
            rstd: &input_rstd,
        };
        let parts = attention.qkv_parts;
        self.qkv_backward(run, grads, stream, parts, &d_qkv, d_stream, needs_input)?;
        for tensor in [d_qkv, input, input_rstd] {
            run.workspace.give(tensor);
        }
        Ok(())
    }

    /// From the output stream's gradient to that of the stream before the mlp.
    fn mlp_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        attention: &AttentionSaved,
        gate_up: GateUpSaved,
        down_parts: Vec<PartSaved>,
        d_stream: &mut Tensor,
    ) -> Result<()> {
        let (workspace, dtype, tokens) = (run.workspace, run.dtype, run.rows);
        let GateUpSaved {
            values: mut gate_up,
            parts,
        } = gate_up;
        let mut activated = workspace.take(dtype, tokens, self.down.in_features);
        gated_activation::forward(self.activation, gate_up.view(), activated.view_mut())?;
        let mut d_activated = workspace.take(dtype, tokens, self.down.in_features);
        let dx = Some(d_activated.view_mut());
        self.down.backward(
            run,
            grads,
            activated.view(),
            down_parts,
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
        let (middle, rstd) = (&attention.middle, &attention.middle_rstd);
        let normed = self.mlp_norm.recompute(run, middle, rstd)?;
        let mut d_normed = workspace.take(dtype, tokens, self.gate_up.in_features);
        let dx = Some(d_normed.view_mut());
        self.gate_up
            .backward(run, grads, normed.view(), parts, gate_up.view(), dx)?;
        workspace.give(normed);
        workspace.give(gate_up);
        let dx = d_stream.view_mut();
        self.mlp_norm
            .backward(run, grads, &d_normed, middle, rstd, dx)?;
        workspace.give(d_normed);
        Ok(())
    }

    /// From the gradient of q, k and v to that of the input stream, where anything asks for it.
    #[expect(
        clippy::too_many_arguments,
        reason = "one call of one group, spelled out"
    )]
    fn qkv_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        input: Stream<'_>,
        parts: Vec<PartSaved>,
        d_qkv: &Tensor,
        d_stream: &mut Tensor,
        needs_input: bool,
    ) -> Result<()> {
        let normed = self.input_norm.recompute(run, input.x, input.rstd)?;
        let mut d_normed = run
            .workspace
            .take(run.dtype, run.rows, self.qkv.in_features);
        let needs_normed = needs_input || self.input_norm.trained();
        let dx = needs_normed.then(|| d_normed.view_mut());
        self.qkv
            .backward(run, grads, normed.view(), parts, d_qkv.view(), dx)?;
        run.workspace.give(normed);
        if needs_normed {
            let dx = d_stream.view_mut();
            self.input_norm
                .backward(run, grads, &d_normed, input.x, input.rstd, dx)?;
        }
        run.workspace.give(d_normed);
        Ok(())
    }

    /// The groups of linears, in the order of execution.
    pub(crate) fn groups(&self) -> [&LinearGroup; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    pub(crate) fn groups_mut(&mut self) -> [&mut LinearGroup; 4] {
        [
            &mut self.qkv,
            &mut self.o,
            &mut self.gate_up,
            &mut self.down,
        ]
    }

    /// Whether a method of its own computes in this layer.
    pub(crate) fn has_custom(&self) -> bool {
        self.groups().iter().any(|group| group.has_custom())
    }

    /// Whether anything in this layer is trained.
    pub(crate) fn trained(&self) -> bool {
        self.input_norm.trained()
            || self.mlp_norm.trained()
            || self.qk_norms.as_ref().is_some_and(QkNorms::trained)
            || self.groups().iter().any(|group| group.trained())
    }
}

/// A residual stream `[T, D]` and its norm's statistics `[T, 1]`.
#[derive(Clone, Copy)]
struct Stream<'a> {
    x: &'a Tensor,
    rstd: &'a Tensor,
}
