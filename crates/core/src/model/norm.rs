//! An RMSNorm of the model: its weight, frozen or trained.

use super::run::Run;
use crate::Result;
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Tensor, View, ViewMut, rms_norm};

/// One RMSNorm. Statistics of each pass are saved by the layer that calls it.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) weight: NormWeight,
    pub(crate) eps: f32,
}

#[derive(Debug)]
pub(crate) enum NormWeight {
    /// `[1, D]`, f32.
    Frozen(Tensor),
    Trained(ParamId),
}

/// A normed activation and the reciprocal standard deviations that made it.
pub(crate) struct Normed {
    pub(crate) y: Tensor,
    /// `[T, 1]`.
    pub(crate) rstd: Tensor,
}

impl Norm {
    pub(crate) fn weight<'a>(&'a self, params: &'a FlatBuffer) -> View<'a> {
        match &self.weight {
            NormWeight::Frozen(weight) => weight.view(),
            NormWeight::Trained(id) => params.view(*id),
        }
    }

    pub(crate) fn forward(&self, run: &Run<'_>, x: &Tensor) -> Result<Normed> {
        let mut normed = Self::output(run, x);
        rms_norm::forward(
            x.view(),
            self.weight(run.params),
            self.eps,
            normed.y.view_mut(),
            normed.rstd.view_mut(),
        )?;
        Ok(normed)
    }

    /// `sum += other`, then the norm of `sum`, in one pass.
    pub(crate) fn add_forward(
        &self,
        run: &Run<'_>,
        sum: &mut Tensor,
        other: &Tensor,
    ) -> Result<Normed> {
        let mut normed = Self::output(run, sum);
        let weight = self.weight(run.params);
        rms_norm::add_forward(
            sum.view_mut(),
            other.view(),
            weight,
            self.eps,
            normed.y.view_mut(),
            normed.rstd.view_mut(),
        )?;
        Ok(normed)
    }

    /// The normed activation again, from the saved statistics: cheaper to recompute than to keep.
    pub(crate) fn recompute(&self, run: &Run<'_>, x: &Tensor, rstd: &Tensor) -> Result<Tensor> {
        let mut y = run.workspace.take(run.dtype, x.rows(), x.cols());
        rms_norm::apply(x.view(), self.weight(run.params), rstd.view(), y.view_mut())?;
        Ok(y)
    }

    /// Adds the gradient of x to `dx`, and of the weight, if trained, to `grads`.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        dy: &Tensor,
        x: &Tensor,
        rstd: &Tensor,
        dx: ViewMut<'_>,
    ) -> Result<()> {
        let d_weight = match self.weight {
            NormWeight::Frozen(_) => None,
            NormWeight::Trained(id) => Some(grads.view_mut(id)),
        };
        rms_norm::backward(
            dy.view(),
            x.view(),
            self.weight(run.params),
            rstd.view(),
            dx,
            d_weight,
        )?;
        Ok(())
    }

    pub(crate) fn trained(&self) -> bool {
        matches!(self.weight, NormWeight::Trained(_))
    }

    fn output(run: &Run<'_>, x: &Tensor) -> Normed {
        Normed {
            y: run.workspace.take(run.dtype, x.rows(), x.cols()),
            rstd: run.workspace.take(DType::F32, x.rows(), 1),
        }
    }
}
