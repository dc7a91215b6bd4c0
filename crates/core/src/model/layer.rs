//! One decoder layer, forward and backward, read top to bottom.
//!
//! Legend: T tokens, D hidden, F mlp width, H query heads, K kv heads, E head_dim.
//!
//! Normed inputs and `act(gate) up` are never kept: to compute them again costs bandwidth and no
//! product. What else is kept depends on the layer's [`Keep`].

use super::activation::Activation;
use super::keep::Keep;
use super::linear::{LinearGroup, PartSaved};
use super::norm::{Norm, Normed};
use super::prompt::Prefix;
use super::qk_norm::QkNorms;
use super::residual::{Joined, Residual};
use super::room::Wide;
use super::run::Run;
use super::saved::{AttentionSaved, DownSaved, GateUpSaved, LayerSaved, Stream};
use crate::Result;
use crate::params::FlatBuffer;
use ferrotune_kernels::{DType, Tensor, attention};

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) input_norm: Norm,
    pub(crate) qkv: LinearGroup,
    pub(crate) qk_norms: Option<QkNorms>,
    pub(crate) o: LinearGroup,
    pub(crate) attention_residual: Residual,
    pub(crate) mlp_norm: Norm,
    pub(crate) gate_up: LinearGroup,
    pub(crate) activation: Activation,
    pub(crate) down: LinearGroup,
    pub(crate) mlp_residual: Residual,
    pub(crate) attention: attention::Config,
    /// Which of the model's ropes; `None` in a layer that rotates nothing.
    pub(crate) rope: Option<usize>,
    /// Keys and values of virtual tokens, where they are trained.
    pub(crate) prefix: Option<Prefix>,
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
        let Normed { y, statistics } = normed;
        let (attention, y) = self.attend(run, &input, y)?;
        let gate_up = self.gate_up(run, &attention.middle.x, y)?;
        let mut activated = self.down.take_input(run);
        self.activate(&gate_up.values, &mut activated)?;
        let mut output = workspace.take(dtype, tokens, self.down.out_features());
        let x = Wide::WithRoom(activated.view_mut());
        let down_parts = self.down.forward(run, x, output.view_mut())?;
        workspace.give(activated);
        let middle = &attention.middle.x;
        let next = self.mlp_residual.forward(run, output, middle, next_norm)?;

        let saved = LayerSaved {
            input: Stream {
                x: input,
                statistics,
            },
            attention: Some(attention),
            gate_up: Some(gate_up),
            down: DownSaved {
                parts: down_parts,
                output: next.saved,
            },
        };
        let saved = match keep {
            Some(keep) => Some(saved.reduced_to(keep, run)),
            None => {
                saved.release(run);
                None
            }
        };
        Ok((next.stream, next.normed, saved))
    }

    /// The attention block: from the input stream and its norm `y`, which is given back, to the
    /// stream before the mlp and its norm.
    fn attend(
        &self,
        run: &Run<'_>,
        input: &Tensor,
        mut y: Option<Tensor>,
    ) -> Result<(AttentionSaved, Option<Tensor>)> {
        let (workspace, dtype, tokens) = (run.workspace, run.dtype, run.rows);
        let mut qkv = workspace.take(dtype, tokens, self.qkv.out_features());
        let x = Normed::wide(&mut y, input);
        let qkv_parts = self.qkv.forward(run, x, qkv.view_mut())?;
        run.give(y);
        let positioned = self.position_all(run, &mut qkv)?;
        let mut attended = self.o.take_input(run);
        let mut lse = workspace.take(DType::F32, tokens, self.attention.heads);
        let [q, k, v] = self.split(&qkv, positioned.as_ref());
        attention::forward(
            &self.attention,
            q,
            k,
            v,
            &run.inputs.cu_seqlens,
            &run.inputs.cu_seqlens,
            attended.view_mut().columns(0..self.o.in_features),
            lse.view_mut(),
        )?;
        if let Some(padding) = &run.inputs.padding {
            let out = attended.view_mut().columns(0..self.o.in_features);
            let device = workspace.device();
            padding.attend(&self.attention, [q, k, v], out, lse.view_mut(), device)?;
        }
        run.give(positioned);
        let mut output = workspace.take(dtype, tokens, self.o.out_features());
        let x = Wide::WithRoom(attended.view_mut());
        let o_parts = self.o.forward(run, x, output.view_mut())?;
        let Joined {
            stream: x,
            normed: Normed { y, statistics },
            saved: output,
        } = self
            .attention_residual
            .forward(run, output, input, &self.mlp_norm)?;
        let saved = AttentionSaved {
            qkv,
            qkv_parts,
            attended,
            lse,
            o_parts,
            output,
            middle: Stream { x, statistics },
        };
        Ok((saved, y))
    }

    /// gate and up of the stream before the mlp and its norm `y`, which is given back.
    fn gate_up(
        &self,
        run: &Run<'_>,
        middle: &Tensor,
        mut y: Option<Tensor>,
    ) -> Result<GateUpSaved> {
        // Its gradient takes its place.
        let mut values = self.gate_up.take_gradient(run);
        let columns = 0..self.gate_up.out_features();
        let x = Normed::wide(&mut y, middle);
        let parts = self
            .gate_up
            .forward(run, x, values.view_mut().columns(columns))?;
        run.give(y);
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
            attention,
            gate_up,
            down,
        } = saved;
        let (attention, y) = match attention {
            Some(attention) => (attention, None),
            None => {
                let y = input.normed(run, &self.input_norm)?;
                let (attention, y) = self.attend(run, &input.x, y)?;
                (attention, Some(y))
            }
        };
        let middle = &attention.middle;
        let gate_up = match (gate_up, y) {
            (Some(gate_up), _) => gate_up,
            (None, Some(y)) => self.gate_up(run, &middle.x, y)?,
            (None, None) => {
                let y = middle.normed(run, &self.mlp_norm)?;
                self.gate_up(run, &middle.x, y)?
            }
        };
        self.mlp_backward(run, grads, middle, gate_up, down, d_stream)?;
        attention.middle.release(run.workspace);

        let mut d_output = self.attention_residual.backward(
            run,
            grads,
            attention.output,
            d_stream.view().columns(0..self.o.out_features()),
            self.o.room(),
        )?;
        let mut d_attended = run.workspace.take(run.dtype, run.rows, self.o.in_features);
        let attended = self.o.input(&attention.attended);
        self.o.backward(
            run,
            grads,
            attended,
            attention.o_parts,
            Wide::WithRoom(d_output.as_mut().unwrap_or(d_stream).view_mut()),
            Some(d_attended.view_mut()),
        )?;
        run.give(d_output);
        let mut d_qkv = self.qkv.take_gradient(run);
        let mut positioned = self.positioned(run, &attention.qkv)?;
        if let Some(qk) = &mut positioned {
            self.place_keys(run, qk)?;
        }
        let [q, k, v] = self.split(&attention.qkv, positioned.as_ref());
        let cu_seqlens = &run.inputs.cu_seqlens;
        attention::backward(
            &self.attention,
            q,
            k,
            v,
            attended,
            attention.lse.view(),
            cu_seqlens,
            d_attended.view(),
            d_qkv.view_mut().columns(0..self.qkv.out_features()),
            run.workspace,
        )?;
        let used = [d_attended, attention.attended, attention.lse];
        run.give(used.into_iter().chain(positioned));
        self.prefix_backward(run, grads, &mut d_qkv)?;
        self.position_backward(run, grads, &attention.qkv, &mut d_qkv)?;
        run.workspace.give(attention.qkv);
        let parts = attention.qkv_parts;
        self.qkv_backward(run, grads, &input, parts, &mut d_qkv, d_stream, needs_input)?;
        run.workspace.give(d_qkv);
        input.release(run.workspace);
        Ok(())
    }

    /// From the output stream's gradient to that of the stream before the mlp.
    fn mlp_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        middle: &Stream,
        gate_up: GateUpSaved,
        down: DownSaved,
        d_stream: &mut Tensor,
    ) -> Result<()> {
        let (workspace, dtype, tokens) = (run.workspace, run.dtype, run.rows);
        let GateUpSaved {
            values: mut gate_up,
            parts,
        } = gate_up;
        let mut d_output = self.mlp_residual.backward(
            run,
            grads,
            down.output,
            d_stream.view().columns(0..self.down.out_features()),
            self.down.room(),
        )?;
        let dy = d_output.as_mut().unwrap_or(d_stream);
        self.down_backward(run, grads, &mut gate_up, down.parts, dy)?;
        run.give(d_output);
        let normed = middle.normed(run, &self.mlp_norm)?;
        let mut d_normed = workspace.take(dtype, tokens, self.gate_up.in_features);
        let (x, dx) = (Normed::read(&normed, &middle.x), Some(d_normed.view_mut()));
        let dy = Wide::WithRoom(gate_up.view_mut());
        self.gate_up.backward(run, grads, x, parts, dy, dx)?;
        run.give(normed);
        workspace.give(gate_up);
        middle.norm_backward(run, grads, &self.mlp_norm, &d_normed, d_stream)?;
        workspace.give(d_normed);
        Ok(())
    }

    /// From the gradient `dy` of the last projection's output to those of gate and up, in their place.
    fn down_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        gate_up: &mut Tensor,
        mut saved: Vec<PartSaved>,
        dy: &mut Tensor,
    ) -> Result<()> {
        let down = &self.down;
        let (columns, inputs) = (0..self.gate_up.out_features(), 0..down.in_features);
        if let Some(weight) = down.in_halves(run, &saved)
            && let Some(PartSaved::Augmented { s }) = saved.pop()
        {
            down.bias_gradients(grads, dy.view())?;
            let mut d_activated = down.take_input(run);
            let dx = d_activated.view_mut().columns(inputs.clone());
            down.input_gradient(run, grads, weight, s, dy.view_mut(), Some(dx))?;
            let gate_up = gate_up.view_mut().columns(columns);
            let d_out = d_activated.view_mut().columns(inputs);
            self.activation.backward_swapped(gate_up, d_out)?;
            down.factor_gradients(run, grads, down.input(&d_activated), dy.view(), None)?;
            run.workspace.give(d_activated);
            return Ok(());
        }
        let mut activated = down.take_input(run);
        self.activate(gate_up, &mut activated)?;
        let mut d_activated = run.workspace.take(run.dtype, run.rows, down.in_features);
        let (x, dx) = (down.input(&activated), Some(d_activated.view_mut()));
        let dy = Wide::WithRoom(dy.view_mut());
        down.backward(run, grads, x, saved, dy, dx)?;
        run.workspace.give(activated);
        let gate_up = gate_up.view_mut().columns(columns);
        self.activation
            .backward_in_place(gate_up, d_activated.view())?;
        run.workspace.give(d_activated);
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
        input: &Stream,
        parts: Vec<PartSaved>,
        d_qkv: &mut Tensor,
        d_stream: &mut Tensor,
        needs_input: bool,
    ) -> Result<()> {
        let normed = input.normed(run, &self.input_norm)?;
        let mut d_normed = run
            .workspace
            .take(run.dtype, run.rows, self.qkv.in_features);
        let needs_normed = needs_input || self.input_norm.trained();
        let dx = needs_normed.then(|| d_normed.view_mut());
        let x = Normed::read(&normed, &input.x);
        let dy = Wide::WithRoom(d_qkv.view_mut());
        self.qkv.backward(run, grads, x, parts, dy, dx)?;
        run.give(normed);
        if needs_normed {
            input.norm_backward(run, grads, &self.input_norm, &d_normed, d_stream)?;
        }
        run.workspace.give(d_normed);
        Ok(())
    }

    /// What the mlp's last projection reads, from gate and up.
    pub(super) fn activate(&self, gate_up: &Tensor, activated: &mut Tensor) -> Result<()> {
        let gate_up = gate_up.view().columns(0..self.gate_up.out_features());
        let out = activated.view_mut().columns(0..self.down.in_features);
        self.activation.forward(gate_up, out)
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

    /// Whether a method computes on the host in this layer.
    pub(crate) fn computes_on_host(&self) -> bool {
        self.groups().iter().any(|group| group.computes_on_host())
    }

    /// Whether anything in this layer is trained.
    pub(crate) fn trained(&self) -> bool {
        let norms = [
            &self.input_norm,
            &self.attention_residual.norm,
            &self.mlp_norm,
            &self.mlp_residual.norm,
        ];
        self.prefix.is_some()
            || norms.iter().any(|norm| norm.trained())
            || self.qk_norms.as_ref().is_some_and(QkNorms::trained)
            || self.groups().iter().any(|group| group.trained())
    }
}
