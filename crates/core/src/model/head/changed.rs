//! A head whose weight a method changes.
//!
//! ```text
//! logits = hidden f(W)^T                                     as a rule
//! logits = hidden W^T + dropout(hidden) (f(W) - W)^T         in training, where the method drops inputs of the change
//! ```

use super::made::{At, Made, MadeGradients, MadeUpdate, Right};
use crate::Result;
use crate::adapter::WeightUpdate;
use crate::model::Model;
use crate::params::FlatBuffer;
use ferrotune_kernels::{DType, Tensor, View, ViewMut, Workspace, axpby, dropout};

impl Model {
    /// f(W) in the table's place, or f(W) - W beside it.
    pub(super) fn made_weight(
        &self,
        at: &At<'_>,
        update: &dyn WeightUpdate,
        hidden: View<'_>,
    ) -> Result<Made> {
        let table = self.head_table().whole(at.params, at.pass.dtype);
        let mut values = to_f32(at, table);
        in_this_step(at, update, |update| {
            update.apply(at.params, values.view_mut())
        })?;
        let Some((key, rows)) = at.mask else {
            return Ok(Made {
                weight: Some(at.placed(values)),
                ..Made::default()
            });
        };
        axpby::add(1.0, values.view_mut(), -1.0, table)?;
        let (change, width) = (at.placed(values), hidden.cols());
        let cols = Workspace::aligned(change.dtype(), width);
        let mut s = (at.pass.workspace).take(change.dtype(), hidden.rows(), cols);
        dropout::forward(hidden, key, rows, s.view_mut().columns(0..width))?;
        let update = MadeUpdate {
            s,
            a: None,
            b: Right::Made(change),
            width,
            scale: 1.0,
        };
        Ok(Made {
            update: Some(update),
            ..Made::default()
        })
    }

    /// Adds the gradients of the method's parameters to `grads`, and what comes through dropped inputs to that of
    /// `hidden`.
    pub(super) fn weight_gradients(
        &self,
        at: &At<'_>,
        grads: &mut FlatBuffer,
        update: &dyn WeightUpdate,
        (made, d): (Made, MadeGradients),
        d_hidden: ViewMut<'_>,
    ) -> Result<()> {
        made.give(at.pass);
        if let (Some((key, rows)), Some(d_s)) = (at.mask, d.s) {
            let through = d_s.view().columns(0..d_hidden.cols());
            dropout::add_masked(d_hidden, through, key, rows)?;
            at.pass.workspace.give(d_s);
        }
        let Some(d_weight) = d.weight.or(d.b) else {
            return Ok(());
        };
        let table = self.head_table().whole(at.params, at.pass.dtype);
        let copy = (table.dtype() != DType::F32).then(|| to_f32(at, table));
        let weight = copy.as_ref().map_or(table, Tensor::view);
        in_this_step(at, update, |update| {
            update.backward(at.params, grads, weight, d_weight.view())
        })
    }
}

/// Calls `body` with the method's update, less what is left out of it in this step.
fn in_this_step(
    at: &At<'_>,
    update: &dyn WeightUpdate,
    body: impl FnOnce(&dyn WeightUpdate) -> Result<()>,
) -> Result<()> {
    match at.draws.map_or(Ok(None), |draws| update.drawn(draws))? {
        Some(update) => body(update.as_ref()),
        None => body(update),
    }
}

/// A copy of the table, f32.
fn to_f32(at: &At<'_>, table: View<'_>) -> Tensor {
    let mut copy = at.temporary(DType::F32, table.rows(), table.cols());
    copy.view_mut().copy_from(table);
    copy
}
