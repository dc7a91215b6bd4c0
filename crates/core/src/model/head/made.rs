//! The head as a method makes it for one pass.

use crate::model::Pass;
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::dropout::Key;
use ferrotune_kernels::linear_cross_entropy::Update;
use ferrotune_kernels::parts::Draws;
use ferrotune_kernels::{DType, Device, Indices, Tensor, View, Workspace};

/// A pass over the head, and what is drawn in it.
#[derive(Clone)]
pub(super) struct At<'a> {
    pub(super) pass: Pass<'a>,
    pub(super) params: &'a FlatBuffer,
    /// Of inputs of the update, where some are dropped.
    pub(super) mask: Option<(Key, &'a Indices<'a>)>,
    /// What is drawn once per step, where anything is.
    pub(super) draws: Option<Draws<'a>>,
}

impl At<'_> {
    /// Of matrices that are made for products.
    pub(super) fn product_dtype(&self) -> DType {
        match self.pass.workspace.device() {
            Device::Cpu => DType::F32,
            Device::Cuda(_) => self.pass.dtype,
        }
    }

    /// A matrix of the vocabulary's size, for this pass.
    pub(super) fn temporary(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        Tensor::temporary(self.pass.workspace.device(), dtype, rows, cols)
    }

    /// What a method made, where products read it, in the dtype they read.
    pub(super) fn placed(&self, made: Tensor) -> Tensor {
        let (device, dtype) = (self.pass.workspace.device(), self.product_dtype());
        if made.dtype() == dtype && made.device().is_cuda() == device.is_cuda() {
            return made;
        }
        let mut placed = self.temporary(dtype, made.rows(), made.cols());
        placed.view_mut().copy_from(made.view());
        placed
    }
}

/// What products with the head read, beside its table.
#[derive(Default)]
pub(super) struct Made {
    /// What takes the table's place, `[V, D]`.
    pub(super) weight: Option<Tensor>,
    pub(super) update: Option<MadeUpdate>,
    /// DoRA's norms of the rows of W + scale * B A, `[1, V]`.
    pub(super) norms: Option<Tensor>,
}

/// `scale s B^T`, which is added to the product.
pub(super) struct MadeUpdate {
    /// `[T, width]` and room up to whole 16 bytes.
    pub(super) s: Tensor,
    /// A, where a method made it.
    pub(super) a: Option<Tensor>,
    pub(super) b: Right,
    /// Columns of s and B that hold values.
    pub(super) width: usize,
    pub(super) scale: f32,
}

/// B `[V, width]`.
pub(super) enum Right {
    Parameter(ParamId),
    /// A copy of the parameter, from the pool.
    Copy(Tensor),
    /// Made by a method, for this pass.
    Made(Tensor),
}

impl MadeUpdate {
    pub(super) fn b<'a>(&'a self, params: &'a FlatBuffer, dtype: DType) -> View<'a> {
        match &self.b {
            Right::Parameter(id) => params.view_as(*id, dtype),
            Right::Copy(b) | Right::Made(b) => b.view().columns(0..self.width),
        }
    }
}

impl Made {
    /// As the loss takes it.
    pub(super) fn as_update<'a>(&'a self, at: &At<'a>) -> Option<Update<'a>> {
        self.update.as_ref().map(|update| Update {
            s: update.s.view().columns(0..update.width),
            b: update.b(at.params, at.pass.dtype),
            scale: update.scale,
        })
    }

    /// Gives buffers back to the pool.
    pub(super) fn give(self, pass: Pass<'_>) {
        if let Some(update) = self.update {
            update.give(pass);
        }
        pass.give_fixed(self.norms);
    }
}

impl MadeUpdate {
    /// Gives buffers back to the pool.
    pub(super) fn give(self, pass: Pass<'_>) {
        pass.workspace.give(self.s);
        if let Right::Copy(b) = self.b {
            pass.give_fixed([b]);
        }
    }
}

/// Gradients of what was made. Those of a B that is the parameter go to the parameter's.
#[derive(Default)]
pub(super) struct MadeGradients {
    /// `[V, D]` f32.
    pub(super) weight: Option<Tensor>,
    /// As s.
    pub(super) s: Option<Tensor>,
    /// As B, f32.
    pub(super) b: Option<Tensor>,
}

impl MadeGradients {
    /// Zeros where the loss adds.
    pub(super) fn of(made: &Made, at: &At<'_>) -> Self {
        let zeroed = |mut gradient: Tensor| {
            gradient.view_mut().fill(0.0);
            gradient
        };
        let weight = made.weight.as_ref();
        let weight = weight.map(|w| zeroed(at.temporary(DType::F32, w.rows(), w.cols())));
        let update = made.update.as_ref();
        Self {
            weight,
            s: update.map(|MadeUpdate { s, .. }| {
                let workspace: &Workspace = at.pass.workspace;
                workspace.take(s.dtype(), s.rows(), s.cols())
            }),
            b: update.and_then(|update| match &update.b {
                Right::Parameter(_) => None,
                Right::Copy(b) => Some(zeroed(at.pass.take_fixed(DType::F32, b.rows(), b.cols()))),
                Right::Made(b) => Some(zeroed(at.temporary(DType::F32, b.rows(), b.cols()))),
            }),
        }
    }
}
