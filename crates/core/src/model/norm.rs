//! Norms of the stream and of what blocks add to it, their parameters frozen or trained.

use super::config::NormKind;
use super::room::Wide;
use super::run::Run;
use crate::Result;
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Tensor, View, ViewMut, axpby, layer_norm, rms_norm};
use std::sync::Arc;

/// One norm. Statistics of each pass are saved by the layer that calls it.
#[derive(Debug)]
pub(crate) enum Norm {
    /// None: what it reads as it is.
    Identity,
    Rms(RmsNorm),
    Layer(LayerNorm),
}

#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Vector,
    /// Added to the weight.
    pub(crate) offset: f32,
    pub(crate) eps: f32,
    /// Columns that what it writes has room for beside its own.
    pub(crate) room: usize,
}

#[derive(Debug)]
pub(crate) struct LayerNorm {
    pub(crate) weight: Vector,
    pub(crate) bias: Vector,
    pub(crate) eps: f32,
    pub(crate) room: usize,
}

/// A parameter `[1, D]`, f32.
#[derive(Debug)]
pub(crate) enum Vector {
    Frozen(Arc<Tensor>),
    Trained(ParamId),
}

/// A normed activation and the statistics that made it; neither where there is no norm.
pub(crate) struct Normed {
    /// `[T, D]` and room.
    pub(crate) y: Option<Tensor>,
    /// Reciprocal standard deviations `[T, 1]`; of a LayerNorm means and those, `[T, 2]`.
    pub(crate) statistics: Option<Tensor>,
}

impl Vector {
    pub(crate) fn view<'a>(&'a self, params: &'a FlatBuffer) -> View<'a> {
        match self {
            Self::Frozen(values) => values.view(),
            Self::Trained(id) => params.view(*id),
        }
    }

    /// Where its gradient goes, if it is trained.
    pub(crate) fn gradient<'a>(&self, grads: &'a mut FlatBuffer) -> Option<ViewMut<'a>> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(id) => Some(grads.view_mut(*id)),
        }
    }

    pub(crate) fn trained(&self) -> bool {
        matches!(self, Self::Trained(_))
    }
}

impl RmsNorm {
    pub(crate) fn weight<'a>(&'a self, params: &'a FlatBuffer) -> rms_norm::Weight<'a> {
        rms_norm::Weight {
            values: self.weight.view(params),
            offset: self.offset,
        }
    }
}

impl LayerNorm {
    fn affine<'a>(&'a self, params: &'a FlatBuffer) -> layer_norm::Affine<'a> {
        layer_norm::Affine {
            weight: self.weight.view(params),
            bias: self.bias.view(params),
            eps: self.eps,
        }
    }

    /// Where the gradients of weight and bias go, as far as they are trained.
    fn gradients<'a>(&self, grads: &'a mut FlatBuffer) -> layer_norm::Gradients<'a> {
        let (weight, bias) = match (&self.weight, &self.bias) {
            (Vector::Trained(weight), Vector::Trained(bias)) => {
                let [weight, bias] = grads.view_two_mut(*weight, *bias);
                (Some(weight), Some(bias))
            }
            (weight, Vector::Frozen(_)) => (weight.gradient(grads), None),
            (Vector::Frozen(_), bias) => (None, bias.gradient(grads)),
        };
        layer_norm::Gradients { weight, bias }
    }
}

impl Normed {
    /// What [`Norm::Identity`] makes.
    const NONE: Self = Self {
        y: None,
        statistics: None,
    };

    /// What the block reads: the normed stream, or `stream` itself.
    pub(crate) fn read<'a>(y: &'a Option<Tensor>, stream: &'a Tensor) -> View<'a> {
        y.as_ref()
            .unwrap_or(stream)
            .view()
            .columns(0..stream.cols())
    }

    /// The same for linears, with the room that it has.
    pub(crate) fn wide<'a>(y: &'a mut Option<Tensor>, stream: &'a Tensor) -> Wide<'a> {
        match y {
            Some(y) => Wide::WithRoom(y.view_mut()),
            None => Wide::Plain(stream.view()),
        }
    }

    /// The same alone: what else there is goes back to the pool.
    pub(crate) fn into_read(self, run: &Run<'_>, stream: Tensor) -> Tensor {
        run.give(self.statistics);
        match self.y {
            None => stream,
            Some(y) => {
                run.workspace.give(stream);
                y
            }
        }
    }
}

impl Norm {
    pub(crate) fn forward(&self, run: &Run<'_>, x: &Tensor) -> Result<Normed> {
        let Some([mut y, mut statistics]) = self.outputs(run, x) else {
            return Ok(Normed::NONE);
        };
        let (out, kept) = (y.view_mut().columns(0..x.cols()), statistics.view_mut());
        match self {
            Self::Identity => {}
            Self::Rms(norm) => {
                let weight = norm.weight(run.params);
                rms_norm::forward(x.view(), weight, norm.eps, out, kept)?;
            }
            Self::Layer(norm) => {
                layer_norm::forward(x.view(), norm.affine(run.params), out, kept)?;
            }
        }
        Ok(Normed {
            y: Some(y),
            statistics: Some(statistics),
        })
    }

    /// `sum += other`, then the norm of `sum`, in one pass.
    pub(crate) fn add_forward(
        &self,
        run: &Run<'_>,
        sum: &mut Tensor,
        other: &Tensor,
    ) -> Result<Normed> {
        let Some([mut y, mut statistics]) = self.outputs(run, sum) else {
            axpby::add(1.0, sum.view_mut(), 1.0, other.view())?;
            return Ok(Normed::NONE);
        };
        let (sum, other) = (sum.view_mut(), other.view());
        let out = y.view_mut().columns(0..sum.cols());
        let kept = statistics.view_mut();
        match self {
            Self::Identity => {}
            Self::Rms(norm) => {
                let weight = norm.weight(run.params);
                rms_norm::add_forward(sum, other, weight, norm.eps, out, kept)?;
            }
            Self::Layer(norm) => {
                layer_norm::add_forward(sum, other, norm.affine(run.params), out, kept)?;
            }
        }
        Ok(Normed {
            y: Some(y),
            statistics: Some(statistics),
        })
    }

    /// The normed activation again, from the saved statistics: cheaper to recompute than to keep.
    pub(crate) fn recompute(
        &self,
        run: &Run<'_>,
        x: &Tensor,
        statistics: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        let Some(statistics) = statistics else {
            return Ok(None);
        };
        let cols = x.cols();
        let mut y = run.workspace.take(run.dtype, x.rows(), cols + self.room());
        let (x, kept, out) = (x.view(), statistics.view(), y.view_mut().columns(0..cols));
        match self {
            Self::Identity => {}
            Self::Rms(norm) => rms_norm::apply(x, norm.weight(run.params), kept, out)?,
            Self::Layer(norm) => layer_norm::apply(x, norm.affine(run.params), kept, out)?,
        }
        Ok(Some(y))
    }

    /// Adds the gradient of x to `dx`, and of the parameters, if trained, to `grads`.
    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        dy: View<'_>,
        x: &Tensor,
        statistics: Option<&Tensor>,
        dx: ViewMut<'_>,
    ) -> Result<()> {
        let x = x.view();
        match (self, statistics) {
            (Self::Rms(norm), Some(rstd)) => {
                let (weight, d_weight) = (norm.weight(run.params), norm.weight.gradient(grads));
                rms_norm::backward(dy, x, weight, rstd.view(), dx, d_weight)?;
            }
            (Self::Layer(norm), Some(statistics)) => {
                let (weight, gradients) = (norm.weight.view(run.params), norm.gradients(grads));
                layer_norm::backward(dy, x, weight, statistics.view(), dx, gradients)?;
            }
            _ => axpby::add(1.0, dx, 1.0, dy)?,
        }
        Ok(())
    }

    fn room(&self) -> usize {
        match self {
            Self::Identity => 0,
            Self::Rms(norm) => norm.room,
            Self::Layer(norm) => norm.room,
        }
    }

    /// The same with `columns` more in what it writes.
    pub(crate) fn with_room(mut self, columns: usize) -> Self {
        match &mut self {
            Self::Identity => {}
            Self::Rms(norm) => norm.room = columns,
            Self::Layer(norm) => norm.room = columns,
        }
        self
    }

    pub(crate) fn trained(&self) -> bool {
        match self {
            Self::Identity => false,
            Self::Rms(norm) => norm.weight.trained(),
            Self::Layer(norm) => norm.weight.trained() || norm.bias.trained(),
        }
    }

    /// The normed `x` and its statistics, to be written; neither where there is no norm.
    fn outputs(&self, run: &Run<'_>, x: &Tensor) -> Option<[Tensor; 2]> {
        let statistics = match self {
            Self::Identity => return None,
            Self::Rms(_) => NormKind::Rms.statistics(),
            Self::Layer(_) => NormKind::Layer.statistics(),
        };
        Some([
            run.workspace
                .take(run.dtype, x.rows(), x.cols() + self.room()),
            run.workspace.take(DType::F32, x.rows(), statistics),
        ])
    }
}
