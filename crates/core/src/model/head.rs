//! The output projection: the embedding's table or one of its own, as it is or as a method changes it.

mod changed;
mod low_rank;
mod made;

use super::run::Run;
use super::vocabulary::{Table, TrainedRows};
use super::{Mode, Model, Pass};
use crate::Result;
use crate::adapter::{Attachment, LowRank, LowRankFactors, WeightUpdate};
use crate::params::FlatBuffer;
use ferrotune_kernels::linear_cross_entropy::{
    self, Accumulator, Head as Projection, HeadGradients, Labels, UpdateGradients,
};
use ferrotune_kernels::{DType, Device, Indices, Tensor, View, ViewMut, matmul};
use made::{At, Made, MadeGradients};
use rayon::prelude::*;
use std::sync::OnceLock;

#[derive(Debug)]
pub(super) struct Head {
    /// `None`: the embedding's.
    pub(super) table: Option<Table>,
    pub(super) update: Option<HeadUpdate>,
    /// Where the update is one of a table whose tokens have changed places.
    pub(super) moved: Option<Moved>,
    /// Index of its site; the key of its random draws.
    pub(super) site: usize,
    /// Norms of the rows of its frozen table, once DoRA has asked for them.
    pub(super) row_lengths: OnceLock<Tensor>,
}

/// What a method makes of the head.
#[derive(Debug)]
pub(super) enum HeadUpdate {
    LowRank(LowRank),
    Factors(Box<dyn LowRankFactors>),
    Weight(Box<dyn WeightUpdate>),
}

impl HeadUpdate {
    /// What stands at the head, or what is trained there instead.
    pub(super) fn of(attachment: Option<Attachment>) -> (Option<Self>, Option<Attachment>) {
        match attachment {
            Some(Attachment::LowRank(update)) => (Some(Self::LowRank(update)), None),
            Some(Attachment::Factors(method)) => (Some(Self::Factors(method)), None),
            Some(Attachment::Weight(method)) => (Some(Self::Weight(method)), None),
            other => (None, other),
        }
    }

    /// Whether it can stand beside trained rows of the table: what changes the table reads all of it.
    pub(super) fn adds_only(&self) -> bool {
        matches!(self, Self::LowRank(update) if update.magnitude.is_none())
    }

    pub(super) fn computes_on_host(&self) -> bool {
        match self {
            Self::LowRank(_) => false,
            Self::Factors(method) => method.computes_on_host(),
            Self::Weight(method) => method.computes_on_host(),
        }
    }

    /// Probability that an input is dropped.
    fn dropout(&self) -> f32 {
        match self {
            Self::LowRank(update) => update.dropout,
            Self::Factors(method) => method.dropout(),
            Self::Weight(method) => method.dropout(),
        }
    }
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
        let (workspace, at) = (run.workspace, self.at(run));
        let mut d_hidden = workspace.take(run.dtype, hidden.rows(), hidden.cols());
        let made = self.made(&at, hidden)?;
        let mut d = MadeGradients::of(&made, &at);
        linear_cross_entropy::forward_backward(
            hidden,
            self.projection(&at, &made),
            self.labels(run),
            d_hidden.view_mut(),
            self.gradients(grads, &made, &mut d),
            sums,
            workspace,
        )?;
        self.method_gradients(&at, grads, hidden, (made, d), d_hidden.view_mut())?;
        Ok(d_hidden)
    }

    /// Adds the losses of the labels of `run` to `sums`.
    pub(super) fn head_loss(
        &self,
        run: &Run<'_>,
        hidden: View<'_>,
        sums: &mut Accumulator,
    ) -> Result<()> {
        let at = self.at(run);
        let made = self.made(&at, hidden)?;
        let (projection, labels) = (self.projection(&at, &made), self.labels(run));
        linear_cross_entropy::forward(hidden, projection, labels, sums, run.workspace)?;
        made.give(at.pass);
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
        let vocabulary = self.config.outputs();
        let at = At {
            pass: Pass {
                mode: Mode::Eval,
                ..pass
            },
            params,
            mask: None,
            draws: None,
        };
        let made = self.made(&at, hidden)?;
        let head = self.projection(&at, &made);
        let mut logits = Tensor::empty(device, DType::F32, hidden.rows(), vocabulary);
        let first = head.weight.rows();
        let to = logits.view_mut().columns(0..first);
        matmul::nt(to, 0.0, head.scale, hidden, head.weight)?;
        if let Some(tail) = head.tail {
            let to = logits.view_mut().columns(first..vocabulary);
            matmul::nt(to, 0.0, head.scale, hidden, tail)?;
        }
        if let Some(update) = head.update {
            let scale = head.scale * update.scale;
            matmul::nt(logits.view_mut(), 1.0, scale, update.s, update.b)?;
        }
        made.give(pass);
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

    /// The head's part of `run`.
    fn at<'a>(&self, run: &'a Run<'_>) -> At<'a> {
        let update = self.head.update.as_ref();
        At {
            pass: run.pass(),
            params: run.params,
            mask: update.and_then(|update| run.dropout(self.head.site, update.dropout())),
            draws: run.draws(self.head.site),
        }
    }

    /// What the method makes of the head and of `hidden`.
    fn made(&self, at: &At<'_>, hidden: View<'_>) -> Result<Made> {
        match &self.head.update {
            None => Ok(Made::default()),
            Some(HeadUpdate::LowRank(update)) => self.made_low_rank(at, update, hidden),
            Some(HeadUpdate::Factors(method)) => self.made_factors(at, method.as_ref(), hidden),
            Some(HeadUpdate::Weight(method)) => self.made_weight(at, method.as_ref(), hidden),
        }
    }

    fn projection<'a>(&'a self, at: &At<'a>, made: &'a Made) -> Projection<'a> {
        let (weight, tail) = match &made.weight {
            Some(weight) => (weight.view(), None),
            None => self.head_table().pieces(at.params, at.pass.dtype),
        };
        Projection {
            weight,
            tail,
            update: made.as_update(at),
            scale: self.config.logits_scale,
            softcap: self.config.logits_softcap,
        }
    }

    /// Where the loss adds gradients: to `d` those of what was made, to `grads` those of parameters.
    fn gradients<'a>(
        &self,
        grads: &'a mut FlatBuffer,
        made: &Made,
        d: &'a mut MadeGradients,
    ) -> HeadGradients<'a> {
        let table = self.head_table();
        let own_b = match (&self.head.update, &d.b) {
            (Some(HeadUpdate::LowRank(update)), None) => Some(update.b),
            _ => None,
        };
        let (mut d_table, mut d_b) = (None, None);
        match (table.param(), own_b) {
            (Some(table), Some(b)) => {
                let [table, b] = grads.view_two_mut(table, b);
                (d_table, d_b) = (Some(table), Some(b));
            }
            (Some(table), None) => d_table = Some(grads.view_mut(table)),
            (None, Some(b)) => d_b = Some(grads.view_mut(b)),
            (None, None) => {}
        }
        let mut gradients = HeadGradients::default();
        if table.rows.is_some() {
            gradients.tail = d_table;
        } else {
            gradients.weight = d.weight.as_mut().map(Tensor::view_mut).or(d_table);
        }
        let width = made.update.as_ref().map_or(0, |update| update.width);
        let of_made = d.b.as_mut().map(|d_b| d_b.view_mut().columns(0..width));
        if let (Some(d_s), Some(b)) = (&mut d.s, of_made.or(d_b)) {
            let s = d_s.view_mut().columns(0..width);
            gradients.update = Some(UpdateGradients { s, b });
        }
        gradients
    }

    /// Adds the gradients of the method's parameters to `grads`, from those of what it made, and its share to that of
    /// `hidden`.
    fn method_gradients(
        &self,
        at: &At<'_>,
        grads: &mut FlatBuffer,
        hidden: View<'_>,
        made: (Made, MadeGradients),
        d_hidden: ViewMut<'_>,
    ) -> Result<()> {
        match &self.head.update {
            None => Ok(()),
            Some(HeadUpdate::LowRank(update)) => {
                self.low_rank_gradients(at, grads, update, hidden, made, d_hidden)
            }
            Some(HeadUpdate::Factors(method)) => {
                Self::factor_gradients(at, grads, method.as_ref(), hidden, made, d_hidden)
            }
            Some(HeadUpdate::Weight(method)) => {
                self.weight_gradients(at, grads, method.as_ref(), made, d_hidden)
            }
        }
    }
}
