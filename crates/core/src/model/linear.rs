//! Linears that share their input (q/k/v, gate/up, or one alone), with whatever is attached to them.
//!
//! Forward of a part: `y = x W^T + b`, then its attachment. Backward computes no gradient of a
//! frozen weight: only `dx = dy W` and what the attachments train.

use super::ahead::Wanted;
use super::attached::Norms;
pub(crate) use super::attached::{PartSaved, Scaled};
use super::changed::Changed;
use super::frozen::{FrozenWeight, Scratch};
use super::room::{Augmented, Wide};
use super::run::Run;
use crate::Result;
use crate::adapter::Attachment;
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Tensor, View, ViewMut, matmul};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// One or more linears over one input.
#[derive(Debug)]
pub(crate) struct LinearGroup {
    /// Its place among the groups of all layers, four of each.
    pub(crate) index: usize,
    pub(crate) in_features: usize,
    pub(crate) parts: Vec<Part>,
    /// All frozen weights as one matrix `[out, in]`, if no part trains its own. Copies of a layer share it.
    pub(crate) frozen: Option<Arc<FrozenWeight>>,
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
    /// Those of adapters that share the model, by their numbers.
    pub(crate) members: Vec<Option<Attachment>>,
    /// Norms of the rows of its frozen weight, once DoRA has asked for them.
    pub(crate) row_lengths: OnceLock<Tensor>,
}

impl Part {
    /// Everything that stands here, of whichever adapter.
    pub(crate) fn all_attached(&self) -> impl Iterator<Item = &Attachment> {
        self.attachment.iter().chain(self.members.iter().flatten())
    }
}

#[derive(Debug)]
pub(crate) enum PartWeight {
    /// Rows `columns` of the group's frozen matrix.
    InGroup,
    /// A frozen matrix of its own, beside trained parts.
    Alone(Arc<FrozenWeight>),
    Trained(ParamId),
}

#[derive(Debug)]
pub(crate) enum PartBias {
    /// `[1, out]`, f32.
    Frozen(Arc<Tensor>),
    Trained(ParamId),
}

/// What makes the base output of some columns.
#[derive(Clone, Copy)]
enum BaseWeight<'a> {
    Frozen(&'a FrozenWeight),
    Trained(ParamId),
    Changed(Changed<'a>),
}

/// A matrix of a group that is held as codes and written out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Matrix {
    /// Of all its linears.
    Group,
    /// The same between margins with the factors of low-rank updates.
    Augmented,
    /// Of one linear.
    Part(usize),
}

impl LinearGroup {
    /// Columns of the output.
    pub(crate) fn out_features(&self) -> usize {
        self.parts.last().map_or(0, |p| p.columns.end)
    }

    /// A matrix for its input, with room.
    pub(crate) fn take_input(&self, run: &Run<'_>) -> Tensor {
        let columns = self.in_features + self.room();
        run.workspace.take(run.dtype, run.rows, columns)
    }

    /// Its input without room.
    pub(crate) fn input<'a>(&self, wide: &'a Tensor) -> View<'a> {
        wide.view().columns(0..self.in_features)
    }

    /// A matrix for the gradient of its output, with room.
    pub(crate) fn take_gradient(&self, run: &Run<'_>) -> Tensor {
        let columns = self.out_features() + self.room();
        run.workspace.take(run.dtype, run.rows, columns)
    }

    /// Its weight, if products with it make its updates too.
    pub(super) fn augmented(&self) -> Option<&Augmented> {
        match self.frozen.as_deref() {
            Some(FrozenWeight::Augmented(weight)) => Some(weight),
            _ => None,
        }
    }

    /// Writes `y` `[T, out]` from `x` `[T, in]`.
    pub(crate) fn forward(
        &self,
        run: &Run<'_>,
        x: Wide<'_>,
        mut y: ViewMut<'_>,
    ) -> Result<Vec<PartSaved>> {
        let x = match (self.augmented(), x) {
            (Some(weight), Wide::WithRoom(x)) => {
                return self.augmented_forward(run, weight, x, y);
            }
            (_, x) => x,
        };
        let x = x.view(self.in_features);
        let mut norms = Norms::default();
        for (columns, base) in self.base_weights() {
            let mut y = y.reborrow().columns(columns.clone());
            if let BaseWeight::Frozen(weight) = base
                && weight.has_own_product()
            {
                if Norms::are_wanted(self, &columns) {
                    weight.with_values(self.scratch, run.workspace, |values| {
                        norms.add(self, run, columns, values, None)
                    })?;
                }
                weight.product(run, self.scratch, x, y)?;
                continue;
            }
            if let BaseWeight::Changed(changed) = base {
                changed.forward(run, x, y)?;
                continue;
            }
            self.with_base(run, base, |weight| {
                norms.add(self, run, columns, weight, Some((x, y.reborrow())))
            })?;
        }
        let mut saved = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let y = y.reborrow().columns(part.columns.clone());
            saved.push(part.forward(run, x, y, &mut norms)?);
        }
        Ok(saved)
    }

    /// From `dy` `[T, out]`: writes `dx` `[T, in]` if given, adds parameter gradients to `grads`.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        mut saved: Vec<PartSaved>,
        dy: Wide<'_>,
        mut dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        self.bias_gradients(grads, dy.view(self.out_features()))?;
        let augmented = saved.pop_if(|saved| matches!(saved, PartSaved::Augmented { .. }));
        let dy = match (self.augmented(), augmented, dy) {
            (Some(weight), Some(PartSaved::Augmented { s }), Wide::WithRoom(dy)) => {
                return self.augmented_backward(run, grads, weight, x, s, dy, dx);
            }
            (_, _, dy) => dy,
        };
        let dy = dy.view(self.out_features());
        // Where it is, dx already holds what changing the output adds to it.
        let begun = saved.iter().any(PartSaved::adds_to_input);
        let changed = self.output_backward(
            run,
            grads,
            x,
            &saved,
            dy,
            dx.as_mut().map(ViewMut::reborrow),
        )?;
        let base_dy = changed.as_ref().map_or(dy, Tensor::view);
        if let Some(dx) = &mut dx {
            let mut beta = if begun { 1.0 } else { 0.0 };
            for (columns, base) in self.base_weights() {
                let dy = base_dy.columns(columns);
                match base {
                    BaseWeight::Changed(changed) => {
                        changed.input_gradient(run, dy, beta, dx.reborrow())?;
                    }
                    base => self.with_base(run, base, |weight| {
                        Ok(matmul::nn(dx.reborrow(), beta, 1.0, dy, weight)?)
                    })?,
                }
                beta = 1.0;
            }
        }
        for (part, saved) in self.parts.iter().zip(saved) {
            let dy = base_dy.columns(part.columns.clone());
            let dx = dx.as_mut().map(ViewMut::reborrow);
            self.weight_gradient(run, grads, part, x, dy)?;
            part.low_rank_backward(run, grads, x, saved, dy, dx)?;
        }
        if let Some(tensor) = changed {
            run.workspace.give(tensor);
        }
        Ok(())
    }

    /// Gradients of biases that are trained.
    pub(crate) fn bias_gradients(&self, grads: &mut FlatBuffer, dy: View<'_>) -> Result<()> {
        for part in &self.parts {
            part.bias_gradient(grads, dy.columns(part.columns.clone()))?;
        }
        Ok(())
    }

    /// Whether a method computes on the host here.
    pub(crate) fn computes_on_host(&self) -> bool {
        let on_host = |attachment: &Attachment| match attachment {
            Attachment::Custom(method) => method.computes_on_host(),
            Attachment::Factors(method) => method.computes_on_host(),
            Attachment::Weight(method) => method.computes_on_host(),
            _ => false,
        };
        let mut attached = self.parts.iter().flat_map(Part::all_attached);
        attached.any(on_host)
    }

    /// Whether anything here is trained.
    pub(crate) fn trained(&self) -> bool {
        let trains = |part: &Part| {
            part.all_attached().next().is_some() || matches!(part.bias, Some(PartBias::Trained(_)))
        };
        self.parts.iter().any(trains)
    }

    /// The gradient of the base output where methods change that, with `dx` begun if they add to it.
    fn output_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        saved: &[PartSaved],
        dy: View<'_>,
        mut dx: Option<ViewMut<'_>>,
    ) -> Result<Option<Tensor>> {
        if !saved.iter().any(PartSaved::changes_output) {
            return Ok(None);
        }
        let mut base_dy = run.workspace.take(dy.dtype(), dy.rows(), dy.cols());
        if let Some(dx) = &mut dx
            && saved.iter().any(PartSaved::adds_to_input)
        {
            dx.reborrow().fill(0.0);
        }
        for (part, saved) in self.parts.iter().zip(saved) {
            let dy = dy.columns(part.columns.clone());
            let base_dy = base_dy.view_mut().columns(part.columns.clone());
            let dx = dx.as_mut().map(ViewMut::reborrow);
            part.output_backward(run, grads, x, saved, dy, base_dy, dx)?;
        }
        Ok(Some(base_dy))
    }

    /// Gradients of a trained weight, or of what a method makes one of.
    fn weight_gradient(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        part: &Part,
        x: View<'_>,
        dy: View<'_>,
    ) -> Result<()> {
        if let PartWeight::Trained(id) = part.weight {
            matmul::tn(grads.view_mut(id), 1.0, 1.0, dy, x)?;
        }
        match self.changed(part) {
            Some(changed) => changed.parameter_gradients(run, grads, x, dy),
            None => Ok(()),
        }
    }

    /// The weight of a part, if a method changes it.
    fn changed<'a>(&'a self, part: &'a Part) -> Option<Changed<'a>> {
        match (&part.weight, &part.attachment) {
            (PartWeight::Alone(weight), Some(Attachment::Weight(update))) => Some(Changed {
                part,
                weight,
                update: update.as_ref(),
                group: self,
            }),
            _ => None,
        }
    }

    /// Calls `product` with the values of `weight`, one of this group.
    pub(super) fn with_values<R>(
        &self,
        run: &Run<'_>,
        weight: &FrozenWeight,
        product: impl FnOnce(View<'_>) -> Result<R>,
    ) -> Result<R> {
        match (&run.ahead, self.matrix_of(weight)) {
            (Some(ahead), Some(matrix)) => {
                let wanted = Wanted {
                    group: self.index,
                    matrix,
                };
                ahead.with(run, wanted, |values| product(values.view()))
            }
            _ => weight.with_values(self.scratch, run.workspace, product),
        }
    }

    /// A copy of the values of `weight`, one of this group, f32.
    pub(super) fn to_f32(&self, run: &Run<'_>, weight: &FrozenWeight) -> Result<Tensor> {
        self.with_values(run, weight, |values| {
            let [rows, cols] = values.shape();
            let mut copy = Tensor::temporary(run.workspace.device(), DType::F32, rows, cols);
            copy.view_mut().copy_from(values);
            Ok(copy)
        })
    }

    /// Which matrix of this group `weight` is, if it is written out for products.
    fn matrix_of(&self, weight: &FrozenWeight) -> Option<Matrix> {
        if !matches!(weight, FrozenWeight::Codes(_) | FrozenWeight::Stacked(_)) {
            return None;
        }
        if self.frozen.is_some() {
            return Some(Matrix::Group);
        }
        let is_it = |part: &Part| match &part.weight {
            PartWeight::Alone(own) => std::ptr::eq(own.as_ref(), weight),
            _ => false,
        };
        self.parts.iter().position(is_it).map(Matrix::Part)
    }

    /// The weight that is `matrix`.
    fn weight_of(&self, matrix: Matrix) -> Option<&FrozenWeight> {
        match matrix {
            Matrix::Group | Matrix::Augmented => self.frozen.as_deref(),
            Matrix::Part(part) => match &self.parts[part].weight {
                PartWeight::Alone(weight) => Some(weight),
                _ => None,
            },
        }
    }

    /// Its shape as it is written out.
    pub(crate) fn shape_of(&self, matrix: Matrix) -> [usize; 2] {
        let shape = self.weight_of(matrix).map_or([0, 0], FrozenWeight::shape);
        match matrix {
            Matrix::Augmented => shape.map(|length| length + self.room()),
            _ => shape,
        }
    }

    /// Writes it to `to`, of that shape.
    pub(crate) fn write_out(&self, run: &Run<'_>, matrix: Matrix, to: ViewMut<'_>) -> Result<()> {
        match (matrix, self.weight_of(matrix)) {
            (Matrix::Augmented, Some(FrozenWeight::Augmented(weight))) => {
                self.write_augmented(run, weight, to)
            }
            (_, Some(weight)) => weight.write(to),
            (_, None) => Ok(()),
        }
    }

    /// Whether products with it read a matrix that is written out for them.
    pub(crate) fn is_written_out(&self) -> bool {
        self.held().any(FrozenWeight::is_written_out)
    }

    /// Whether its format has a product of its own.
    pub(crate) fn has_own_product(&self) -> bool {
        self.held().any(FrozenWeight::has_own_product)
    }

    /// Its frozen matrices.
    fn held(&self) -> impl Iterator<Item = &FrozenWeight> {
        let alone = self.parts.iter().filter_map(|part| match &part.weight {
            PartWeight::Alone(weight) => Some(weight),
            _ => None,
        });
        self.frozen.iter().chain(alone).map(Arc::as_ref)
    }

    /// The weights whose products make the base output, with their columns of it.
    fn base_weights(&self) -> Vec<(Range<usize>, BaseWeight<'_>)> {
        if let Some(weight) = &self.frozen {
            return vec![(0..self.out_features(), BaseWeight::Frozen(weight))];
        }
        let parts = self.parts.iter().filter_map(|part| {
            let weight = match (&part.weight, self.changed(part)) {
                (PartWeight::Trained(id), _) => BaseWeight::Trained(*id),
                (_, Some(changed)) => BaseWeight::Changed(changed),
                (PartWeight::Alone(weight), _) => BaseWeight::Frozen(weight),
                (PartWeight::InGroup, _) => return None,
            };
            Some((part.columns.clone(), weight))
        });
        parts.collect()
    }

    /// Calls `product` with the values of `base`.
    fn with_base(
        &self,
        run: &Run<'_>,
        base: BaseWeight<'_>,
        product: impl FnOnce(View<'_>) -> Result<()>,
    ) -> Result<()> {
        match base {
            BaseWeight::Frozen(weight) => self.with_values(run, weight, product),
            BaseWeight::Trained(id) => product(run.params.view_as(id, run.dtype)),
            BaseWeight::Changed(changed) => changed.with_values(run, product),
        }
    }
}
