//! The state of an optimizer over all trainable tensors.

use super::{Gradient, Optimizer, StateSpec, StateType, StateValues, Step, Tensor, for_tensor};
use crate::Result;
use crate::io::{FileDType, TensorData};
use crate::params::{ParamLayout, Segment};
use ferrotune_kernels::Device;
use ferrotune_kernels::adamw::cuda::Update;
use ferrotune_kernels::optimizer::{self, cuda};
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::Arc;

/// An [`Optimizer`] with what it keeps of every tensor of a layout: on a GPU where it has a kernel there, else in host
/// memory.
#[derive(Debug)]
pub struct TensorStates {
    optimizer: Arc<dyn Optimizer>,
    layout: Arc<ParamLayout>,
    /// In the order of the buffer. Old while the GPU has what is newer.
    tensors: Vec<Kept>,
    gpu: Option<Gpu>,
}

/// The states on a GPU.
#[derive(Debug)]
struct Gpu {
    states: cuda::States,
    newest: Side,
}

/// Where the values of now are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Both,
    Gpu,
    Host,
}

/// Of one tensor.
#[derive(Debug)]
struct Kept {
    specs: Vec<StateSpec>,
    values: Vec<StateValues>,
}

impl TensorStates {
    /// Nothing seen yet.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn new(
        optimizer: Arc<dyn Optimizer>,
        layout: &Arc<ParamLayout>,
        device: &Device,
    ) -> Result<Self> {
        let kept = |segment: &Segment| {
            let specs = for_tensor(optimizer.as_ref(), &segment.spec).state(&segment.spec.shape);
            let values = specs.iter().map(StateValues::zeros).collect();
            Kept { specs, values }
        };
        let tensors = layout
            .physical()
            .map(|(_, segment)| kept(segment))
            .collect();
        let gpu = match (device, optimizer.on_gpu()) {
            (Device::Cuda(device), Some(kernel)) => {
                let moments = kernel.moments().into_iter();
                let signed: Vec<bool> = moments.map(|moment| moment.signed).collect();
                let tensors = layout.physical().map(|(_, segment)| optimizer::Tensor {
                    elements: segment.range(),
                    bytes: kernel.keeps_bytes(segment.range().len()) && !segment.spec.is_table(),
                });
                let tensors: Vec<_> = tensors.collect();
                Some(Gpu {
                    states: cuda::States::new(device, layout.len(), &tensors, &signed)?,
                    newest: Side::Both,
                })
            }
            _ => None,
        };
        Ok(Self {
            optimizer,
            layout: Arc::clone(layout),
            tensors,
            gpu,
        })
    }

    /// Whether updates are [`TensorStates::issue`]d on a GPU.
    pub fn are_on_gpu(&self) -> bool {
        self.gpu.is_some()
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// If they do not compile or load.
    pub fn prepare(&self) -> Result<()> {
        match &self.gpu {
            Some(gpu) => Ok(gpu.states.prepare()?),
            None => Ok(()),
        }
    }

    /// Brings to the GPU what [`TensorStates::issue`] reads there: states, and the scalars of a step. What the host
    /// has becomes old.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn set(&mut self, step: impl Fn(&Segment) -> Step) -> Result<()> {
        let (Some(gpu), Some(kernel)) = (&mut self.gpu, self.optimizer.on_gpu()) else {
            return Ok(());
        };
        if gpu.newest == Side::Host {
            let mut bytes = vec![0; gpu.states.bytes()];
            let values = self.tensors.iter().flat_map(|kept| &kept.values);
            for (place, values) in gpu.states.places().iter().zip(values) {
                bytes[place.clone()].copy_from_slice(values.as_bytes());
            }
            gpu.states.upload(&bytes)?;
        }
        gpu.newest = Side::Gpu;
        let segments = self.layout.physical();
        let scalars: Vec<_> = segments
            .map(|(_, segment)| kernel.scalars(step(segment)))
            .collect();
        Ok(gpu.states.set(&scalars)?)
    }

    /// Updates `buffers` on the GPU by the gradient that `norm` has scaled, unless it was not finite.
    ///
    /// # Errors
    /// If the buffers are not those of the layout; the first failure of the GPU.
    pub fn issue(&mut self, norm: &Update, buffers: cuda::Buffers<'_>) -> Result<()> {
        match (&mut self.gpu, self.optimizer.on_gpu()) {
            (Some(gpu), Some(kernel)) => Ok(gpu.states.step(kernel.kernel(), norm, buffers)?),
            _ => Ok(()),
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
            let optimizer = for_tensor(self.optimizer.as_ref(), &segment.spec);
            jobs.push((optimizer, tensor, &mut kept.values, step(segment)));
        }
        jobs.into_par_iter()
            .try_for_each(|(optimizer, tensor, state, step)| optimizer.update(tensor, state, step))
    }

    /// The state as files have it: `STATE.NAME` for each trainable tensor.
    ///
    /// From a GPU it is copied; after a failure of the device, which its next operation reports, it is NaN.
    pub fn tensors(&self) -> Vec<(String, TensorData<'_>)> {
        let mut copied = self.copied().into_iter().flatten();
        let each = self.layout.physical().zip(&self.tensors);
        let tensors = each.flat_map(|((_, segment), kept)| {
            let states = kept.specs.iter().zip(&kept.values);
            states.map(move |(spec, values)| (segment, spec, values))
        });
        let data = tensors.map(|(segment, spec, values)| {
            let data = TensorData {
                dtype: match spec.dtype {
                    StateType::F32 => FileDType::F32,
                    StateType::U8 => FileDType::U8,
                },
                shape: spec.shape.clone(),
                bytes: match copied.next() {
                    Some(bytes) => Cow::Owned(bytes),
                    None => Cow::Borrowed(values.as_bytes()),
                },
            };
            (format!("{}.{}", spec.name, segment.spec.name), data)
        });
        data.collect()
    }

    /// The bytes of each state, if the GPU alone has them.
    fn copied(&self) -> Option<Vec<Vec<u8>>> {
        let gpu = self.gpu.as_ref().filter(|gpu| gpu.newest == Side::Gpu)?;
        let bytes = gpu.states.download();
        let bytes = bytes.unwrap_or_else(|_| vec![u8::MAX; gpu.states.bytes()]);
        let places = gpu.states.places().iter();
        Some(places.map(|place| bytes[place.clone()].to_vec()).collect())
    }

    /// The same, to be written.
    pub fn bytes_mut(&mut self) -> impl Iterator<Item = (String, &mut [u8])> {
        if let Some(copied) = self.copied() {
            let values = self.tensors.iter_mut().flat_map(|kept| &mut kept.values);
            for (to, from) in values.zip(copied) {
                to.as_bytes_mut().copy_from_slice(&from);
            }
        }
        if let Some(gpu) = &mut self.gpu {
            gpu.newest = Side::Host;
        }
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
