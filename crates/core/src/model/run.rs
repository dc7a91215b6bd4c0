//! What one pass over a micro-batch carries besides activations.

use super::ahead::Ahead;
use super::inputs::Inputs;
use super::offload::Offloading;
use crate::Result;
use crate::params::FlatBuffer;
use ferrotune_kernels::{
    DType, Indices, Tensor, View, Workspace, dropout, embedding, noise, parts, rng,
};
use std::cell::RefCell;
use std::ops::Range;

/// Whether random draws happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No dropout, no noise.
    Eval,
    /// Dropout with masks drawn from `(seed, step, site, document, position, column)`, or from `(seed, step, site)` for
    /// parts of an update, and noise on embeddings, if the model has it.
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

impl Pass<'_> {
    /// A matrix whose size does not grow with the batch, with unspecified contents.
    pub(crate) fn take_fixed(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        Tensor::from_buffer(self.workspace.take_scratch(dtype, rows * cols), rows, cols)
    }

    /// Returns what [`take_fixed`](Self::take_fixed) gave.
    pub(crate) fn give_fixed(&self, tensors: impl IntoIterator<Item = Tensor>) {
        let buffers = tensors.into_iter().map(Tensor::into_buffer);
        buffers.for_each(|buffer| self.workspace.give_scratch(buffer));
    }
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
    /// cos and sin per token of each rope, `[T, rotary_dim / 2]`.
    angles: Vec<[Tensor; 2]>,
    mode: Mode,
    /// Those that share the pass, each with the rows that follow on those of the one before; none in a pass of
    /// one adapter.
    pub(crate) members: Vec<Member<'a>>,
    /// What writes weights ahead of their products, in a pass that does.
    pub(crate) ahead: Option<Ahead<'a>>,
    /// What moves kept activations, in a pass that does.
    pub(crate) offload: Option<Offloading<'a>>,
}

/// One of several adapters in a pass over the same base.
pub(crate) struct Member<'a> {
    /// Which of the model's; `None` for the base alone.
    pub(crate) number: Option<usize>,
    /// Its rows of the pass.
    pub(crate) rows: Range<usize>,
    /// Its own parameters and draws, over its own rows.
    pub(crate) run: Run<'a>,
    pub(crate) grads: RefCell<&'a mut FlatBuffer>,
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
            angles: (inputs.angles.iter())
                .map(|angles| Ok([gather(&angles.cos)?, gather(&angles.sin)?]))
                .collect::<Result<_>>()?,
            mode: pass.mode,
            members: Vec::new(),
            ahead: None,
            offload: None,
        })
    }

    /// Gives the rows behind those of the members before to one with a pass of its own.
    pub(crate) fn join(&mut self, number: Option<usize>, run: Self, grads: &'a mut FlatBuffer) {
        let first = self.members.last().map_or(0, |member| member.rows.end);
        self.members.push(Member {
            number,
            rows: first..first + run.rows,
            run,
            grads: RefCell::new(grads),
        });
    }

    /// The rows of the member at `place`, or all.
    pub(crate) fn rows_of(&self, place: usize) -> Range<usize> {
        let member = self.members.get(place);
        member.map_or(0..self.rows, |member| member.rows.clone())
    }

    /// Gives everything back.
    pub(crate) fn end(self) {
        let workspace = self.workspace;
        let tables = self.angles.into_iter().flatten();
        tables.for_each(|table| workspace.give(table));
        let members = self.members.into_iter();
        members.for_each(|member| member.run.end());
    }

    /// cos and sin of the model's rope number `rope`.
    pub(crate) fn angles(&self, rope: usize) -> [View<'_>; 2] {
        let [cos, sin] = &self.angles[rope];
        [cos.view(), sin.view()]
    }

    /// Gives buffers back to the pool.
    pub(crate) fn give(&self, tensors: impl IntoIterator<Item = Tensor>) {
        tensors.into_iter().for_each(|t| self.workspace.give(t));
    }

    /// [`Pass::take_fixed`].
    pub(crate) fn take_fixed(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        self.pass().take_fixed(dtype, rows, cols)
    }

    /// [`Pass::give_fixed`].
    pub(crate) fn give_fixed(&self, tensors: impl IntoIterator<Item = Tensor>) {
        self.pass().give_fixed(tensors);
    }

    /// Where and in which precision it runs.
    pub(crate) fn pass(&self) -> Pass<'a> {
        Pass {
            workspace: self.workspace,
            dtype: self.dtype,
            mode: self.mode,
        }
    }

    /// Adds the noise of training to embeddings `[T, D]`, if there is any.
    pub(crate) fn add_noise(&self, stream: &mut Tensor) -> Result<()> {
        match self.mode {
            Mode::Train { seed, .. } if !self.inputs.noise.is_empty() => {
                let (draws, scales) = (&self.inputs.draws, &self.inputs.noise);
                let seed = rng::key_for(seed, "neftune");
                Ok(noise::add(stream.view_mut(), seed, draws, scales)?)
            }
            _ => Ok(()),
        }
    }

    /// What is drawn once per step at site `site`, if draws happen: which parts of an update are left out.
    pub(crate) fn draws(&self, site: usize) -> Option<parts::Draws<'a>> {
        match self.mode {
            Mode::Train { seed, .. } => Some(parts::Draws {
                key: rng::mix(rng::key_for(seed, "dropout of parts"), site as u64),
                steps: &self.inputs.draws,
            }),
            Mode::Eval => None,
        }
    }

    /// The mask of an update's dropout of inputs with probability `p` at site `site`, if one applies.
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
