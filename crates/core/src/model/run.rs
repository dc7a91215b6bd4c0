//! What one pass over a micro-batch carries besides activations.

use super::inputs::Inputs;
use crate::Result;
use crate::params::FlatBuffer;
use ferrotune_kernels::{DType, Indices, Tensor, Workspace, dropout, embedding, rng};

/// Whether random draws happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No dropout.
    Eval,
    /// Dropout with masks drawn from `(seed, step, site, document, position, column)`.
    Train {
        /// Seed of the run.
        seed: u64,
        /// Optimizer step, from 0.
        step: u64,
    },
}

/// Where and in which precision a pass runs.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Pool of activation buffers.
    pub workspace: &'a Workspace,
    /// Dtype of activations.
    pub dtype: DType,
    /// Whether random draws happen.
    pub mode: Mode,
}

/// The surroundings of a forward and its backward.
pub(crate) struct Run<'a> {
    pub(crate) params: &'a FlatBuffer,
    pub(crate) workspace: &'a Workspace,
    /// Dtype of activations.
    pub(crate) dtype: DType,
    pub(crate) inputs: &'a Inputs<'a>,
    /// T, padding included.
    pub(crate) rows: usize,
    /// cos and sin per token, `[T, rotary_dim / 2]`.
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
    mode: Mode,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        params: &'a FlatBuffer,
        pass: Pass<'a>,
        inputs: &'a Inputs<'a>,
    ) -> Result<Self> {
        let gather = |table: &Tensor| -> Result<Tensor> {
            let mut rows = pass.workspace.take(DType::F32, inputs.rows, table.cols());
            embedding::forward(table.view(), &inputs.positions, rows.view_mut())?;
            Ok(rows)
        };
        Ok(Self {
            params,
            workspace: pass.workspace,
            dtype: pass.dtype,
            inputs,
            rows: inputs.rows,
            cos: gather(&inputs.angles.cos)?,
            sin: gather(&inputs.angles.sin)?,
            mode: pass.mode,
        })
    }

    /// Gives everything back.
    pub(crate) fn end(self) {
        self.workspace.give(self.cos);
        self.workspace.give(self.sin);
    }

    /// The mask of a low-rank update's dropout with probability `p` at site `site`, if one applies.
    pub(crate) fn dropout(&self, site: usize, p: f32) -> Option<(dropout::Key, &Indices<'a>)> {
        match self.mode {
            Mode::Train { seed, .. } if p > 0.0 => {
                let key = dropout::Key {
                    seed: rng::mix(rng::key_for(seed, "dropout"), site as u64),
                    p,
                };
                Some((key, &self.inputs.draws))
            }
            _ => None,
        }
    }
}
