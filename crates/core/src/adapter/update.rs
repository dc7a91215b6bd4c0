//! What a method computes on one linear, beyond a plain low-rank update.
//!
//! A method implements the narrowest of these that holds it: [`LowRankFactors`] costs what LoRA does,
//! [`WeightUpdate`] one more product per backward, and [`CustomLinear`] what it pleases.
//!
//! Matrices are where the base is. A method that has no kernels for what it computes may bring them to
//! host memory and back (`View::to_f32_vec`, `ViewMut::copy_from`), at the price of the way.

use crate::params::FlatBuffer;
use crate::{Error, Result};
use ferrotune_kernels::parts::Draws;
use ferrotune_kernels::{Tensor, View, ViewMut};
use std::fmt::Debug;

/// `y += scale * dropout(x) A^T B^T` with A and B made of the method's parameters.
pub trait LowRankFactors: Debug + Send + Sync {
    /// Rows of A.
    fn rank(&self) -> usize;

    /// Factor of the update.
    fn scale(&self) -> f32 {
        1.0
    }

    /// Probability that an element of x is dropped before A, in training.
    fn dropout(&self) -> f32 {
        0.0
    }

    /// Whether a pass on a GPU brings values to the host, or makes them there, so that it cannot be recorded and
    /// replayed. A pass that does neither makes its matrices with [`Tensor::temporary`].
    fn computes_on_host(&self) -> bool {
        true
    }

    /// A `[rank, in_features]` and B `[out_features, rank]`, f32, at the home of `params` or in host memory.
    ///
    /// # Errors
    /// If a kernel refuses its arguments.
    fn factors(&self, params: &FlatBuffer) -> Result<[Tensor; 2]>;

    /// Adds the parameters' gradients to `grads`, from those of A and B, f32 where the base is.
    ///
    /// # Errors
    /// If a kernel refuses its arguments.
    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_a: View<'_>,
        d_b: View<'_>,
    ) -> Result<()>;
}

/// `y = x f(W)^T + b`: the method gives f and its vector-Jacobian product, the linear does the rest.
///
/// With [`WeightUpdate::dropout`], training computes `y = x W^T + dropout(x) (f(W) - W)^T + b`.
pub trait WeightUpdate: Debug + Send + Sync {
    /// As [`LowRankFactors::computes_on_host`].
    fn computes_on_host(&self) -> bool {
        true
    }

    /// Turns W `[out_features, in_features]`, f32 where the base is or, to be merged, in host memory, into f(W).
    ///
    /// # Errors
    /// If a kernel refuses its arguments.
    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()>;

    /// Matrices of W's size that [`WeightUpdate::apply`] or [`WeightUpdate::backward`] holds at a time, beside those it is
    /// given: for the plan of memory.
    fn temporaries(&self) -> usize {
        2
    }

    /// Probability that an element of x is dropped before the change of W, in training.
    fn dropout(&self) -> f32 {
        0.0
    }

    /// The update as it is in one optimizer step, for methods that leave out parts of it in training. `draws` are
    /// those of the step and the site: the same for every micro-batch, forward and backward.
    ///
    /// # Errors
    /// If a kernel refuses its arguments.
    fn drawn(&self, draws: Draws<'_>) -> Result<Option<Box<dyn WeightUpdate + '_>>> {
        let _ = draws;
        Ok(None)
    }

    /// Turns W into what the gradient of x is computed with: f(W), but for comparisons with software that
    /// computes another.
    ///
    /// # Errors
    /// If a kernel refuses its arguments.
    fn apply_for_input_gradient(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        self.apply(params, weight)
    }

    /// Adds the parameters' gradients to `grads`, from W and the gradient of f(W), both
    /// `[out_features, in_features]`, f32 where the base is.
    ///
    /// # Errors
    /// If a kernel refuses its arguments.
    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()>;
}

/// A method's own arithmetic on one linear. Parameters and gradients live in the flat buffers.
pub trait CustomLinear: Debug + Send + Sync {
    /// As [`LowRankFactors::computes_on_host`].
    fn computes_on_host(&self) -> bool {
        true
    }

    /// Columns of all that [`CustomLinear::forward`] returns, `[T, columns]` in the dtype of the outputs, which plans of
    /// memory count; 0 if it returns nothing.
    fn kept_columns(&self) -> usize {
        0
    }

    /// `y` `[T, out]` holds the base output on entry and the adapted output on return.
    ///
    /// Returns what backward needs; x `[T, in]` need not be in it. The same operands must give the
    /// same bits: where memory is short, backward calls this once more instead of keeping its results.
    ///
    /// # Errors
    /// If a kernel refuses its arguments.
    fn forward(&self, params: &FlatBuffer, x: View<'_>, y: ViewMut<'_>) -> Result<Vec<Tensor>>;

    /// `dy` `[T, out]` holds the gradient of the adapted output on entry and of the base output on
    /// return; the linear turns that into its own share of `dx` afterwards.
    ///
    /// Direct contributions to the gradient of x are added to `dx` `[T, in]`, which is `None` when
    /// nobody needs it. Parameter gradients are added to `grads`.
    ///
    /// # Errors
    /// If a kernel refuses its arguments.
    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        x: View<'_>,
        saved: &[Tensor],
        dy: ViewMut<'_>,
        dx: Option<ViewMut<'_>>,
    ) -> Result<()>;

    /// Folds the method into the base: weight `[out, in]` and bias `[1, out]`, f32 in host memory.
    ///
    /// # Errors
    /// [`Error::Config`] if the method is no function of the weight; so too by default.
    fn merge(
        &self,
        params: &FlatBuffer,
        weight: ViewMut<'_>,
        bias: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let _ = (params, weight, bias);
        Err(Error::config(
            "peft_type",
            "this method cannot be merged into the base",
        ))
    }
}
