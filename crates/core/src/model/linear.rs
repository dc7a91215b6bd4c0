//! Linears that share their input (q/k/v, gate/up, or one alone), with whatever is attached to them.
//!
//! Forward of a part: `y = x W^T + b`, then its attachment. Backward computes no gradient of a
//! frozen weight: only `dx = dy W` and what the attachments train.

use super::frozen::{FrozenWeight, Scratch};
use super::run::Run;
use crate::Result;
use crate::adapter::{Attachment, LowRank};
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{Tensor, View, ViewMut, Workspace, bias, lora_linear, matmul};
use std::ops::Range;

/// One or more linears over one input.
#[derive(Debug)]
pub(crate) struct LinearGroup {
    pub(crate) in_features: usize,
    pub(crate) parts: Vec<Part>,
    /// All frozen weights as one matrix `[out, in]`, if no part trains its own.
    pub(crate) frozen: Option<FrozenWeight>,
    /// Where weights that are not held as values are written for a product.
    pub(crate) scratch: Scratch,
}

/// One linear of a group.
#[derive(Debug)]
pub(crate) struct Part {
    /// Index of its site; the key of its random draws.
    pub(crate) site: usize,
    /// Its columns of the group's output.
    pub(crate) columns: Range<usize>,
    pub(crate) weight: PartWeight,
    pub(crate) bias: Option<PartBias>,
    pub(crate) attachment: Option<Attachment>,
}

#[derive(Debug)]
pub(crate) enum PartWeight {
    /// Rows `columns` of the group's frozen matrix.
    InGroup,
    /// A frozen matrix of its own, beside trained parts.
    Alone(FrozenWeight),
    Trained(ParamId),
}

#[derive(Debug)]
pub(crate) enum PartBias {
    /// `[1, out]`, f32.
    Frozen(Tensor),
    Trained(ParamId),
}

/// What a part's attachment needs for backward.
pub(crate) enum PartSaved {
    None,
    /// `dropout(x) A^T`, `[T, rank]` and room up to whole 16 bytes.
    LowRank(Tensor),
    Custom(Vec<Tensor>),
}

impl LinearGroup {
    /// Columns of the output.
    pub(crate) fn out_features(&self) -> usize {
        self.parts.last().map_or(0, |p| p.columns.end)
    }

    /// Writes `y` `[T, out]` from `x` `[T, in]`.
    pub(crate) fn forward(
        &self,
        run: &Run<'_>,
        x: View<'_>,
        mut y: ViewMut<'_>,
    ) -> Result<Vec<PartSaved>> {
        self.each_product(run, |columns, weight| {
            Ok(matmul::nt(
                y.reborrow().columns(columns),
                0.0,
                1.0,
                x,
                weight,
            )?)
        })?;
        let mut saved = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let mut y = y.reborrow().columns(part.columns.clone());
            if let Some(values) = part.bias(run.params) {
                bias::add(y.reborrow(), values)?;
            }
            saved.push(match &part.attachment {
                Some(Attachment::LowRank(low_rank)) => {
                    if let Some(id) = low_rank.bias {
                        bias::add_scaled(y.reborrow(), low_rank.scale, run.params.view(id))?;
                    }
                    let update = update(run, part, low_rank);
                    let dtype = update.a.dtype();
                    let cols = Workspace::aligned(dtype, low_rank.rank);
                    let mut s = run.workspace.take(dtype, x.rows(), cols);
                    let rank = s.view_mut().columns(0..low_rank.rank);
                    lora_linear::forward(x, &update, y, rank, run.workspace)?;
                    PartSaved::LowRank(s)
                }
                Some(Attachment::Custom(custom)) => {
                    PartSaved::Custom(custom.forward(run.params, x, y)?)
                }
                _ => PartSaved::None,
            });
        }
        Ok(saved)
    }

    /// From `dy` `[T, out]`: writes `dx` `[T, in]` if given, adds parameter gradients to `grads`.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        saved: Vec<PartSaved>,
        dy: View<'_>,
        mut dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let custom = self.custom_backward(
            run,
            grads,
            x,
            &saved,
            dy,
            dx.as_mut().map(ViewMut::reborrow),
        )?;
        let base_dy = custom.as_ref().map_or(dy, Tensor::view);
        if let Some(dx) = &mut dx {
            // After a custom method dx already holds its share.
            let mut beta = if custom.is_some() { 1.0 } else { 0.0 };
            self.each_product(run, |columns, weight| {
                matmul::nn(dx.reborrow(), beta, 1.0, base_dy.columns(columns), weight)?;
                beta = 1.0;
                Ok(())
            })?;
        }
        for (part, saved) in self.parts.iter().zip(saved) {
            let part_dy = base_dy.columns(part.columns.clone());
            part.base_gradients(grads, x, part_dy)?;
            if let (Some(Attachment::LowRank(low_rank)), PartSaved::LowRank(s)) =
                (&part.attachment, saved)
            {
                let update = update(run, part, low_rank);
                let dx = dx.as_mut().map(ViewMut::reborrow);
                low_rank_backward(run, grads, low_rank, &update, x, &s, part_dy, dx)?;
                run.workspace.give(s);
            }
        }
        if let Some(tensor) = custom {
            run.workspace.give(tensor);
        }
        Ok(())
    }

    /// Whether a method of its own computes here.
    pub(crate) fn has_custom(&self) -> bool {
        let custom = |part: &Part| matches!(part.attachment, Some(Attachment::Custom(_)));
        self.parts.iter().any(custom)
    }

    /// Whether anything here is trained.
    pub(crate) fn trained(&self) -> bool {
        let trains = |part: &Part| {
            part.attachment.is_some() || matches!(part.bias, Some(PartBias::Trained(_)))
        };
        self.parts.iter().any(trains)
    }

    /// The gradient of the base output where a custom method changes it, with `dx` begun.
    fn custom_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        saved: &[PartSaved],
        dy: View<'_>,
        mut dx: Option<ViewMut<'_>>,
    ) -> Result<Option<Tensor>> {
        if !saved.iter().any(|s| matches!(s, PartSaved::Custom(_))) {
            return Ok(None);
        }
        let mut base_dy = run.workspace.take(dy.dtype(), dy.rows(), dy.cols());
        base_dy.view_mut().copy_from(dy);
        if let Some(dx) = &mut dx {
            dx.reborrow().fill(0.0);
        }
        for (part, saved) in self.parts.iter().zip(saved) {
            if let (Some(Attachment::Custom(custom)), PartSaved::Custom(saved)) =
                (&part.attachment, saved)
            {
                let dy = base_dy.view_mut().columns(part.columns.clone());
                custom.backward(
                    run.params,
                    grads,
                    x,
                    saved,
                    dy,
                    dx.as_mut().map(ViewMut::reborrow),
                )?;
            }
        }
        Ok(Some(base_dy))
    }

    /// Calls `product` for each product that makes the base output, with the columns of y and the
    /// weight rows they come from.
    fn each_product(
        &self,
        run: &Run<'_>,
        mut product: impl FnMut(Range<usize>, View<'_>) -> Result<()>,
    ) -> Result<()> {
        let (scratch, workspace) = (self.scratch, run.workspace);
        if let Some(weight) = &self.frozen {
            let columns = 0..self.out_features();
            return weight.with_values(scratch, workspace, |values| product(columns, values));
        }
        for part in &self.parts {
            let columns = part.columns.clone();
            match &part.weight {
                PartWeight::Trained(id) => product(columns, run.params.view_as(*id, run.dtype))?,
                PartWeight::Alone(weight) => {
                    weight.with_values(scratch, workspace, |values| product(columns, values))?;
                }
                PartWeight::InGroup => {}
            }
        }
        Ok(())
    }
}

fn update<'a>(run: &'a Run<'_>, part: &Part, low_rank: &LowRank) -> lora_linear::LowRank<'a> {
    lora_linear::LowRank {
        a: run.params.view_as(low_rank.a, run.dtype),
        b: run.params.view_as(low_rank.b, run.dtype),
        scale: low_rank.scale,
        dropout: run.dropout(part.site, low_rank),
    }
}

impl Part {
    fn bias<'a>(&'a self, params: &'a FlatBuffer) -> Option<View<'a>> {
        self.bias.as_ref().map(|bias| match bias {
            PartBias::Frozen(values) => values.view(),
            PartBias::Trained(id) => params.view(*id),
        })
    }

    /// Gradients of a trained base weight and bias.
    fn base_gradients(&self, grads: &mut FlatBuffer, x: View<'_>, dy: View<'_>) -> Result<()> {
        if let PartWeight::Trained(id) = self.weight {
            matmul::tn(grads.view_mut(id), 1.0, 1.0, dy, x)?;
        }
        if let Some(PartBias::Trained(id)) = self.bias {
            bias::backward(dy, grads.view_mut(id))?;
        }
        Ok(())
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "one call of one kernel, spelled out"
)]
fn low_rank_backward(
    run: &Run<'_>,
    grads: &mut FlatBuffer,
    low_rank: &LowRank,
    update: &lora_linear::LowRank<'_>,
    x: View<'_>,
    s: &Tensor,
    dy: View<'_>,
    dx: Option<ViewMut<'_>>,
) -> Result<()> {
    if let Some(id) = low_rank.bias {
        bias::backward_scaled(dy, low_rank.scale, grads.view_mut(id))?;
    }
    let [d_a, d_b] = grads.view_two_mut(low_rank.a, low_rank.b);
    let s = s.view().columns(0..low_rank.rank);
    lora_linear::backward(x, update, s, dy, dx, d_a, d_b, run.workspace)?;
    Ok(())
}
