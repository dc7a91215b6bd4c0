//! The output projection: the embedding's table or one of its own, with or without a low-rank update.

use super::run::Run;
use super::vocabulary::{Table, TrainedRows};
use super::{Model, Pass};
use crate::Result;
use crate::adapter::LowRank;
use crate::params::FlatBuffer;
use ferrotune_kernels::linear_cross_entropy::{
    self, Accumulator, Head as Projection, HeadGradients, Labels, Update, UpdateGradients,
};
use ferrotune_kernels::{
    DType, Device, Indices, Tensor, View, Workspace, axpby, embedding, lora_linear, matmul,
};
use rayon::prelude::*;

#[derive(Debug)]
pub(super) struct Head {
    /// `None`: the embedding's.
    pub(super) table: Option<Table>,
    pub(super) update: Option<LowRank>,
    /// Where the update is one of a table whose tokens have changed places.
    pub(super) moved: Option<Moved>,
    /// Index of its site; the key of its random draws.
    pub(super) site: usize,
}

/// Tokens and rows of a table that has its trained rows last.
#[derive(Debug)]
pub(super) struct Moved {
    /// The token of each row.
    tokens: Indices<'static>,
    /// The row of each token.
    places: Indices<'static>,
}

impl Moved {
    pub(super) fn new(rows: &TrainedRows, device: &Device) -> Self {
        Self {
            tokens: Indices::new(rows.tokens(), device),
            places: Indices::new(rows.places().to_vec(), device),
        }
    }
}

/// What an update makes of hidden states, in the form the loss takes it: a bias of B is one more column of
/// B, against a one behind each row of s.
struct Updated {
    /// `[T, width]` and room up to whole 16 bytes.
    s: Tensor,
    /// B with its bias, its rows where the table has their tokens, `[V, width]` and such room; unless that is B.
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
            let mut d_wide = self.wide(workspace, DType::F32, b.cols());
            d_wide.view_mut().fill(0.0);
            d_wide
        });
        let own_b = self.head.update.as_ref().filter(|_| d_wide.is_none());
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
            if let Some(d_wide) = d_wide {
                self.add_wide(workspace, grads, update, d_wide)?;
            }
            give(workspace, updated);
            workspace.give(d_s);
        }
        Ok(d_hidden)
    }

    /// A buffer `[V, cols]`, which does not grow with the batch.
    fn wide(&self, workspace: &Workspace, dtype: DType, cols: usize) -> Tensor {
        let vocabulary = self.config.vocab_size;
        let buffer = workspace.take_scratch(dtype, vocabulary * cols);
        Tensor::from_buffer(buffer, vocabulary, cols)
    }

    /// [`Updated::b`].
    fn wide_b(
        &self,
        workspace: &Workspace,
        params: &FlatBuffer,
        dtype: DType,
        update: &LowRank,
    ) -> Result<Option<Tensor>> {
        if update.bias.is_none() && self.head.moved.is_none() {
            return Ok(None);
        }
        let b = params.view_as(update.b, dtype);
        let width = width(update);
        let cols = Workspace::aligned(b.dtype(), width);
        let mut wide = self.wide(workspace, b.dtype(), cols);
        let bias = update.bias.map(|id| {
            let values = params.view_as(id, dtype);
            (values.reshaped(b.rows(), 1), update.rank..width)
        });
        for (values, columns) in std::iter::once((b, 0..update.rank)).chain(bias) {
            let to = wide.view_mut().columns(columns);
            match &self.head.moved {
                Some(moved) => embedding::forward(values, &moved.tokens, to)?,
                None => to.copy_from(values),
            }
        }
        Ok(Some(wide))
    }

    /// Adds the gradient of [`Updated::b`] to those of B and its bias.
    fn add_wide(
        &self,
        workspace: &Workspace,
        grads: &mut FlatBuffer,
        update: &LowRank,
        mut d_wide: Tensor,
    ) -> Result<()> {
        if let Some(moved) = &self.head.moved {
            let mut placed = self.wide(workspace, DType::F32, d_wide.cols());
            embedding::forward(d_wide.view(), &moved.places, placed.view_mut())?;
            std::mem::swap(&mut d_wide, &mut placed);
            workspace.give_scratch(placed.into_buffer());
        }
        let d_b = d_wide.view().columns(0..update.rank);
        axpby::add(1.0, grads.view_mut(update.b), 1.0, d_b)?;
        if let Some(bias) = update.bias {
            let d_bias = d_wide.view().columns(update.rank..width(update));
            let to = grads.view_mut(bias).reshaped(d_wide.rows(), 1);
            axpby::add(1.0, to, 1.0, d_bias)?;
        }
        workspace.give_scratch(d_wide.into_buffer());
        Ok(())
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
            let wide = self.wide_b(pass.workspace, params, pass.dtype, update)?;
            let [a, b] = [update.a, update.b].map(|id| params.view_as(id, pass.dtype));
            let width = width(update);
            let b = wide
                .as_ref()
                .map_or(b, |wide| wide.view().columns(0..width));
            let cols = Workspace::aligned(a.dtype(), width);
            let mut s = pass.workspace.take(a.dtype(), hidden.rows(), cols);
            if update.bias.is_some() {
                s.view_mut().fill(1.0);
            }
            matmul::nt(s.view_mut().columns(0..update.rank), 0.0, 1.0, hidden, a)?;
            let s_wide = s.view().columns(0..width);
            matmul::nt(logits.view_mut(), 1.0, scale * update.scale, s_wide, b)?;
            give(pass.workspace, Updated { s, b: wide, width });
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
        let width = width(update);
        let cols = Workspace::aligned(dtype, width);
        let mut s = run.workspace.take(dtype, hidden.rows(), cols);
        if update.bias.is_some() {
            s.view_mut().fill(1.0);
        }
        let b = self.wide_b(run.workspace, run.params, run.dtype, update)?;
        let to = s.view_mut().columns(0..update.rank);
        lora_linear::down(hidden, &factors, to, run.workspace)?;
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

/// Columns of [`Updated::b`] that hold values.
fn width(update: &LowRank) -> usize {
    update.rank + usize::from(update.bias.is_some())
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
