//! A weight that a method changes: its products forward and backward.
//!
//! ```text
//! y = x f(W)^T                                    as a rule
//! y = x W^T + dropout(x) (f(W) - W)^T             in training, where the method drops inputs of the change
//! y = int8(x, W) + x (f(W) - W)^T                 where W is bytes that have a product of their own
//! ```

use super::frozen::FrozenWeight;
use super::linear::{LinearGroup, Part};
use super::run::Run;
use crate::Result;
use crate::adapter::WeightUpdate;
use crate::params::FlatBuffer;
use ferrotune_kernels::dropout::{self, Key};
use ferrotune_kernels::{DType, Indices, Tensor, View, ViewMut, axpby, matmul};

/// W `[out, in]` of one linear, and f.
#[derive(Clone, Copy)]
pub(super) struct Changed<'a> {
    pub(super) part: &'a Part,
    pub(super) weight: &'a FrozenWeight,
    pub(super) update: &'a dyn WeightUpdate,
    pub(super) group: &'a LinearGroup,
}

/// What a product makes.
#[derive(Clone, Copy)]
enum Product {
    Output,
    InputGradient,
}

/// A mask of inputs.
type Mask<'a> = (Key, &'a Indices<'a>);

impl Changed<'_> {
    /// Writes `y` `[T, out]` from `x` `[T, in]`.
    pub(super) fn forward(&self, run: &Run<'_>, x: View<'_>, mut y: ViewMut<'_>) -> Result<()> {
        let (mask, bytes) = (self.mask(run), self.weight.has_own_product());
        if mask.is_none() && !bytes {
            return self.with_values(run, |weight| Ok(matmul::nt(y, 0.0, 1.0, x, weight)?));
        }
        if bytes {
            (self.weight).product(run, self.group.scratch, x, y.reborrow())?;
        } else {
            self.with_base(run, |weight| {
                Ok(matmul::nt(y.reborrow(), 0.0, 1.0, x, weight)?)
            })?;
        }
        let change = self.change(run)?;
        let add = |x: View<'_>| Ok(matmul::nt(y, 1.0, 1.0, x, change.view())?);
        match mask {
            None => add(x),
            Some(mask) => with_dropped(run, mask, x, add),
        }
    }

    /// Writes, or with a `beta` of 1 adds, the gradient of x to `dx` `[T, in]`, from that of y.
    pub(super) fn input_gradient(
        &self,
        run: &Run<'_>,
        dy: View<'_>,
        beta: f32,
        mut dx: ViewMut<'_>,
    ) -> Result<()> {
        let Some((key, rows)) = self.mask(run) else {
            let values = self.values(run, Product::InputGradient)?;
            let weight = self.part.placed(run, &values);
            return Ok(matmul::nn(dx, beta, 1.0, dy, weight.view())?);
        };
        self.with_base(run, |weight| {
            Ok(matmul::nn(dx.reborrow(), beta, 1.0, dy, weight)?)
        })?;
        let change = self.change(run)?;
        let mut through = run.workspace.take(dx.dtype(), dx.rows(), dx.cols());
        matmul::nn(through.view_mut(), 0.0, 1.0, dy, change.view())?;
        dropout::add_masked(dx, through.view(), key, rows)?;
        run.workspace.give(through);
        Ok(())
    }

    /// Adds the gradients of the method's parameters to `grads`.
    pub(super) fn parameter_gradients(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        x: View<'_>,
        dy: View<'_>,
    ) -> Result<()> {
        let [rows, cols] = [dy.cols(), x.cols()];
        let mut gradient = Tensor::temporary(run.workspace.device(), DType::F32, rows, cols);
        let mut product = |x: View<'_>| Ok(matmul::tn(gradient.view_mut(), 0.0, 1.0, dy, x)?);
        match self.mask(run) {
            None => product(x)?,
            Some(mask) => with_dropped(run, mask, x, product)?,
        }
        let base = self.group.to_f32(run, self.weight)?;
        self.in_this_step(run, |update| {
            update.backward(run.params, grads, base.view(), gradient.view())
        })
    }

    /// Calls `product` with f(W) as products read it.
    pub(super) fn with_values(
        &self,
        run: &Run<'_>,
        product: impl FnOnce(View<'_>) -> Result<()>,
    ) -> Result<()> {
        let values = self.values(run, Product::Output)?;
        product(self.part.placed(run, &values).view())
    }

    fn mask<'a>(&self, run: &'a Run<'_>) -> Option<Mask<'a>> {
        run.dropout(self.part.site, self.update.dropout())
    }

    fn with_base(&self, run: &Run<'_>, product: impl FnOnce(View<'_>) -> Result<()>) -> Result<()> {
        self.group.with_values(run, self.weight, product)
    }

    /// Calls `body` with the method's update, less what is left out of it in this step.
    fn in_this_step(
        &self,
        run: &Run<'_>,
        body: impl FnOnce(&dyn WeightUpdate) -> Result<()>,
    ) -> Result<()> {
        let draws = run.draws(self.part.site);
        match draws.map_or(Ok(None), |draws| self.update.drawn(draws))? {
            Some(update) => body(update.as_ref()),
            None => body(self.update),
        }
    }

    /// f(W), f32, for products that make `of`.
    fn values(&self, run: &Run<'_>, of: Product) -> Result<Tensor> {
        let mut values = self.group.to_f32(run, self.weight)?;
        let weight = values.view_mut();
        self.in_this_step(run, |update| match of {
            Product::Output => update.apply(run.params, weight),
            Product::InputGradient => update.apply_for_input_gradient(run.params, weight),
        })?;
        Ok(values)
    }

    /// f(W) - W as products read it.
    fn change(&self, run: &Run<'_>) -> Result<Tensor> {
        let mut change = self.values(run, Product::Output)?;
        self.with_base(run, |weight| {
            Ok(axpby::add(1.0, change.view_mut(), -1.0, weight)?)
        })?;
        Ok(self.part.placed(run, &change))
    }
}

/// Calls `product` with `x` of which elements are dropped.
fn with_dropped(
    run: &Run<'_>,
    (key, rows): Mask<'_>,
    x: View<'_>,
    product: impl FnOnce(View<'_>) -> Result<()>,
) -> Result<()> {
    let mut dropped = run.workspace.take(x.dtype(), x.rows(), x.cols());
    dropout::forward(x, key, rows, dropped.view_mut())?;
    product(dropped.view())?;
    run.workspace.give(dropped);
    Ok(())
}
