//! The output projection: the embedding's table or one of its own, with or without a low-rank update.

use super::run::Run;
use super::vocabulary::Table;
use super::{Model, Pass};
use crate::Result;
use crate::adapter::LowRank;
use crate::params::FlatBuffer;
use ferrotune_kernels::linear_cross_entropy::{
    self, Accumulator, Head as Projection, HeadGradients, Labels, Update, UpdateGradients,
};
use ferrotune_kernels::{DType, Device, Tensor, View, Workspace, axpby, bias, lora_linear, matmul};
use rayon::prelude::*;

#[derive(Debug)]
pub(super) struct Head {
    /// `None`: the embedding's.
    pub(super) table: Option<Table>,
    pub(super) update: Option<LowRank>,
    /// Index of its site; the key of its random draws.
    pub(super) site: usize,
}

/// What an update makes of hidden states, in the form the loss takes it: a bias of B is one more column of
/// B, against a one behind each row of s.
struct Updated {
    /// `[T, width]` and room up to whole 16 bytes.
    s: Tensor,
    /// B with its bias, `[V, width]` and such room, where it has one.
    b: Option<Tensor>,
    /// rank, and one more with a bias.
    width: usize,
}

impl Model {
    /// The table that the head projects with.
    pub(super) fn head_table(&self) -> &Table {
        self.head.table.as_ref().unwrap_or(&self.embedding.table)
    }

    /// Adds the losses of the labels of `run` to `sums`, and the gradients of what is trained of the
    /// head to `grads`; returns that of `hidden` `[T, D]`.
    pub(super) fn head_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        hidden: View<'_>,
        sums: &mut Accumulator,
    ) -> Result<Tensor> {
        let (workspace, rows) = (run.workspace, hidden.rows());
        let mut d_hidden = workspace.take(run.dtype, rows, hidden.cols());
        let updated = self.head_down(run, hidden)?;
        let projection = self.projection(run.params, run.dtype, updated.as_ref());
        let mut d_s = updated
            .as_ref()
            .map(|Updated { s, .. }| workspace.take(s.dtype(), s.rows(), s.cols()));
        let mut d_wide = updated.as_ref().and_then(|u| u.b.as_ref()).map(|b| {
            let mut d_wide = self.wide(run, DType::F32, b.cols());
            d_wide.view_mut().fill(0.0);
            d_wide
        });
        let own_b = self.head.update.as_ref().filter(|u| u.bias.is_none());
        let table = self.head_table();
        let mut gradients = HeadGradients::default();
        let (mut d_table, mut d_b) = (None, None);
        match (table.param(), own_b) {
            (Some(table), Some(update)) => {
                let [table, b] = grads.view_two_mut(table, update.b);
                (d_table, d_b) = (Some(table), Some(b));
            }
            (Some(table), None) => d_table = Some(grads.view_mut(table)),
            (None, Some(update)) => d_b = Some(grads.view_mut(update.b)),
            (None, None) => {}
        }
        if table.rows.is_some() {
            gradients.tail = d_table;
        } else {
            gradients.weight = d_table;
        }
        let width = updated.as_ref().map_or(0, |updated| updated.width);
        let d_b = match &mut d_wide {
            Some(d_wide) => Some(d_wide.view_mut().columns(0..width)),
            None => d_b,
        };
        if let (Some(d_s), Some(b)) = (&mut d_s, d_b) {
            let s = d_s.view_mut().columns(0..width);
            gradients.update = Some(UpdateGradients { s, b });
        }
        linear_cross_entropy::forward_backward(
            hidden,
            projection,
            self.labels(run),
            d_hidden.view_mut(),
            gradients,
            sums,
            workspace,
        )?;
        if let (Some(updated), Some(d_s), Some(update)) = (updated, d_s, &self.head.update) {
            let d_a = grads.view_mut(update.a);
            let ds = d_s.view().columns(0..update.rank);
            let dx = Some(d_hidden.view_mut());
            let factors = factors(run, self.head.site, update);
            lora_linear::down_backward(hidden, &factors, ds, dx, d_a, workspace)?;
            if let (Some(d_wide), Some(bias)) = (d_wide, update.bias) {
                let d_b = d_wide.view().columns(0..update.rank);
                axpby::add(1.0, grads.view_mut(update.b), 1.0, d_b)?;
                let d_bias = d_wide.view().columns(update.rank..width);
                let to = grads.view_mut(bias).reshaped(d_wide.rows(), 1);
                axpby::add(1.0, to, 1.0, d_bias)?;
                workspace.give_scratch(d_wide.into_buffer());
            }
            give(workspace, updated);
            workspace.give(d_s);
        }
        Ok(d_hidden)
    }

    /// A buffer `[V, cols]`, which does not grow with the batch.
    fn wide(&self, run: &Run<'_>, dtype: DType, cols: usize) -> Tensor {
        let vocabulary = self.config.vocab_size;
        let buffer = run.workspace.take_scratch(dtype, vocabulary * cols);
        Tensor::from_buffer(buffer, vocabulary, cols)
    }

    /// Adds the losses of the labels of `run` to `sums`.
    pub(super) fn head_loss(
        &self,
        run: &Run<'_>,
        hidden: View<'_>,
        sums: &mut Accumulator,
    ) -> Result<()> {
        let updated = self.head_down(run, hidden)?;
        let projection = self.projection(run.params, run.dtype, updated.as_ref());
        let labels = self.labels(run);
        linear_cross_entropy::forward(hidden, projection, labels, sums, run.workspace)?;
        updated
            .into_iter()
            .for_each(|updated| give(run.workspace, updated));
        Ok(())
    }

    /// `hidden` `[N, D]` times the head, without random draws: `[N, V]` f32 in host memory.
    pub(super) fn project(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        hidden: View<'_>,
    ) -> Result<Tensor> {
        let device = pass.workspace.device();
        let vocabulary = self.config.vocab_size;
        let mut logits = Tensor::empty(device, DType::F32, hidden.rows(), vocabulary);
        let scale = self.config.logits_scale;
        let (weight, tail) = self.head_table().pieces(params, pass.dtype);
        let first = weight.rows();
        let to = logits.view_mut().columns(0..first);
        matmul::nt(to, 0.0, scale, hidden, weight)?;
        if let Some(tail) = tail {
            let to = logits.view_mut().columns(first..vocabulary);
            matmul::nt(to, 0.0, scale, hidden, tail)?;
        }
        if let Some(update) = &self.head.update {
            let [a, b] = [update.a, update.b].map(|id| params.view_as(id, pass.dtype));
            let cols = Workspace::aligned(a.dtype(), update.rank);
            let mut s = pass.workspace.take(a.dtype(), hidden.rows(), cols);
            matmul::nt(s.view_mut().columns(0..update.rank), 0.0, 1.0, hidden, a)?;
            let s_rank = s.view().columns(0..update.rank);
            matmul::nt(logits.view_mut(), 1.0, scale * update.scale, s_rank, b)?;
            pass.workspace.give(s);
            if let Some(id) = update.bias {
                bias::add_scaled(logits.view_mut(), scale * update.scale, params.view(id))?;
            }
        }
        if device.is_cuda() {
            logits = logits.to_device(&Device::Cpu);
            device.synchronize()?;
        }
        let softcap = self.config.logits_softcap;
        if let (Some(softcap), Some(mut rows)) = (softcap, logits.view_mut().typed::<f32>()) {
            rows.data_mut()
                .par_iter_mut()
                .for_each(|z| *z = softcap * (*z / softcap).tanh());
        }
        Ok(self.in_order_of_tokens(logits))
    }

    /// Columns where the tokens are, not where the table has them.
    fn in_order_of_tokens(&self, logits: Tensor) -> Tensor {
        let Some(rows) = &self.head_table().rows else {
            return logits;
        };
        let (count, vocabulary) = (logits.rows(), logits.cols());
        let values = logits.to_f32_vec();
        let placed = values
            .chunks(vocabulary.max(1))
            .flat_map(|row| (0..vocabulary as u32).map(|token| row[rows.place(token) as usize]));
        Tensor::from_f32(placed.collect(), count, vocabulary)
    }

    fn labels<'a>(&self, run: &Run<'a>) -> Labels<'a> {
        Labels {
            rows: &run.inputs.label_rows,
            targets: &run.inputs.targets,
            smoothing: self.label_smoothing,
        }
    }

    /// `dropout(hidden) A^T` of the head's update, and its B.
    fn head_down(&self, run: &Run<'_>, hidden: View<'_>) -> Result<Option<Updated>> {
        let Some(update) = &self.head.update else {
            return Ok(None);
        };
        let factors = factors(run, self.head.site, update);
        let dtype = factors.a.dtype();
        let width = update.rank + usize::from(update.bias.is_some());
        let cols = Workspace::aligned(dtype, width);
        let mut s = run.workspace.take(dtype, hidden.rows(), cols);
        let mut wide = None;
        if let Some(bias) = update.bias {
            s.view_mut().fill(1.0);
            let mut b = self.wide(run, dtype, cols);
            let columns = b.view_mut().columns(0..update.rank);
            columns.copy_from(factors.b);
            let values = run.params.view_as(bias, run.dtype).reshaped(b.rows(), 1);
            let column = b.view_mut().columns(update.rank..width);
            column.copy_from(values);
            wide = Some(b);
        }
        let to = s.view_mut().columns(0..update.rank);
        lora_linear::down(hidden, &factors, to, run.workspace)?;
        let b = wide;
        Ok(Some(Updated { s, b, width }))
    }

    fn projection<'a>(
        &'a self,
        params: &'a FlatBuffer,
        dtype: DType,
        updated: Option<&'a Updated>,
    ) -> Projection<'a> {
        let (weight, tail) = self.head_table().pieces(params, dtype);
        let update = updated.zip(self.head.update.as_ref());
        let update = update.map(|(Updated { s, b, width }, update)| Update {
            s: s.view().columns(0..*width),
            b: match b {
                Some(b) => b.view().columns(0..*width),
                None => params.view_as(update.b, dtype),
            },
            scale: update.scale,
        });
        Projection {
            weight,
            tail,
            update,
            scale: self.config.logits_scale,
            softcap: self.config.logits_softcap,
        }
    }
}

fn give(workspace: &Workspace, updated: Updated) {
    workspace.give(updated.s);
    if let Some(b) = updated.b {
        workspace.give_scratch(b.into_buffer());
    }
}

fn factors<'a>(run: &'a Run<'_>, site: usize, update: &LowRank) -> lora_linear::LowRank<'a> {
    lora_linear::LowRank {
        a: run.params.view_as(update.a, run.dtype),
        b: run.params.view_as(update.b, run.dtype),
        scale: update.scale,
        dropout: run.dropout(site, update.dropout),
        silent: None,
    }
}
