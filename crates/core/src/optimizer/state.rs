//! The state of an optimizer over all trainable tensors.

use super::{Gradient, Optimizer, StateSpec, StateType, StateValues, Step, Tensor};
use crate::Result;
use crate::io::{FileDType, TensorData};
use crate::params::{ParamLayout, Segment};
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::Arc;

/// An [`Optimizer`] with what it keeps of every tensor of a layout, in host memory.
#[derive(Debug)]
pub struct TensorStates {
    optimizer: Arc<dyn Optimizer>,
    layout: Arc<ParamLayout>,
    /// In the order of the buffer.
    tensors: Vec<Kept>,
}

/// Of one tensor.
#[derive(Debug)]
struct Kept {
    specs: Vec<StateSpec>,
    values: Vec<StateValues>,
}

impl TensorStates {
    /// Nothing seen yet.
    pub fn new(optimizer: Arc<dyn Optimizer>, layout: &Arc<ParamLayout>) -> Self {
        let kept = |segment: &Segment| {
            let specs = optimizer.state(&segment.spec.shape);
            let values = specs.iter().map(StateValues::zeros).collect();
            Kept { specs, values }
        };
        let tensors = layout
            .physical()
            .map(|(_, segment)| kept(segment))
            .collect();
        Self {
            optimizer,
            layout: Arc::clone(layout),
            tensors,
        }
    }

    /// Updates `params` by `grads * scale`, flat buffers of the layout, tensors beside one another.
    ///
    /// # Errors
    /// As [`Optimizer::update`].
    pub fn update(
        &mut self,
        params: &mut [f32],
        grads: &[f32],
        scale: f32,
        step: impl Fn(&Segment) -> Step,
    ) -> Result<()> {
        let mut rest = params;
        let mut at = 0;
        let mut jobs = Vec::with_capacity(self.tensors.len());
        for ((_, segment), kept) in self.layout.physical().zip(&mut self.tensors) {
            let range = segment.range();
            let (_, tail) = std::mem::take(&mut rest).split_at_mut(range.start - at);
            let (values, tail) = tail.split_at_mut(range.len());
            (rest, at) = (tail, range.end);
            if values.is_empty() {
                continue;
            }
            let grad = Gradient {
                values: &grads[range],
                scale,
            };
            let tensor = Tensor {
                shape: &segment.spec.shape,
                transposed: segment.spec.transposed,
                values,
                grad,
            };
            jobs.push((tensor, &mut kept.values, step(segment)));
        }
        let optimizer = self.optimizer.as_ref();
        jobs.into_par_iter()
            .try_for_each(|(tensor, state, step)| optimizer.update(tensor, state, step))
    }

    /// The state as files have it: `STATE.NAME` for each trainable tensor.
    pub fn tensors(&self) -> impl Iterator<Item = (String, TensorData<'_>)> {
        let each = self.layout.physical().zip(&self.tensors);
        each.flat_map(|((_, segment), kept)| {
            let states = kept.specs.iter().zip(&kept.values);
            states.map(|(spec, values)| {
                let data = TensorData {
                    dtype: match spec.dtype {
                        StateType::F32 => FileDType::F32,
                        StateType::U8 => FileDType::U8,
                    },
                    shape: spec.shape.clone(),
                    bytes: Cow::Borrowed(values.as_bytes()),
                };
                (format!("{}.{}", spec.name, segment.spec.name), data)
            })
        })
    }

    /// The same, to be written.
    pub fn bytes_mut(&mut self) -> impl Iterator<Item = (String, &mut [u8])> {
        let each = self.layout.physical().zip(&mut self.tensors);
        each.flat_map(|((_, segment), kept)| {
            let states = kept.specs.iter().zip(&mut kept.values);
            states.map(|(spec, values)| {
                let name = format!("{}.{}", spec.name, segment.spec.name);
                (name, values.as_bytes_mut())
            })
        })
    }
}
