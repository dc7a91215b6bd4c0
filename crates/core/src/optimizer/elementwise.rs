//! Optimizers that treat every element alike.

use super::{OnGpu, Optimizer, StateSpec, StateValues, Step, Tensor};
use crate::Result;
use bytemuck::Pod;
use ferrotune_kernels::optimizer::{Rule as Kernel, SCALAR_BYTES};
use rayon::prelude::*;
use std::fmt::Debug;

/// Elements of a job: enough to outweigh handing it to a thread.
pub(super) const JOB: usize = 1 << 14;
/// Elements that are updated at once, whose gradients lie on the stack; and moments of a rule, at most.
pub(super) use ferrotune_kernels::optimizer::{BLOCK, MOST_MOMENTS};

/// A value that is kept for every element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Its name.
    pub name: &'static str,
    /// Whether its 8-bit map has negative values.
    pub signed: bool,
}

impl Moment {
    /// One that can be negative.
    #[must_use]
    pub const fn signed(name: &'static str) -> Self {
        Self { name, signed: true }
    }

    /// One that cannot.
    #[must_use]
    pub const fn unsigned(name: &'static str) -> Self {
        Self {
            name,
            signed: false,
        }
    }
}

/// What an optimizer does to each element.
pub trait Rule: Debug + Send + Sync {
    /// Its kernel on a GPU.
    const KERNEL: Kernel;
    /// What is the same for all elements of a tensor in a step; the kernel's struct of the rule has the same fields.
    type Scalars: Pod + Send + Sync;

    /// What is kept of an element, at most three values.
    fn moments(&self) -> Vec<Moment>;

    /// The scalars of a step.
    fn scalars(&self, step: Step) -> Self::Scalars;

    /// Updates some elements: slices of one length, one of `moments` for each of [`Rule::moments`].
    fn update(
        scalars: &Self::Scalars,
        values: &mut [f32],
        grad: &[f32],
        moments: &mut [&mut [f32]],
    );
}

/// A [`Rule`] with moments in f32.
#[derive(Clone, Debug)]
pub struct Elementwise<R>(pub R);

impl<R: Rule> Optimizer for Elementwise<R> {
    fn state(&self, shape: &[usize]) -> Vec<StateSpec> {
        let moments = self.0.moments().into_iter();
        moments
            .map(|moment| StateSpec::f32(moment.name, shape))
            .collect()
    }

    fn update(&self, tensor: Tensor<'_>, state: &mut [StateValues], step: Step) -> Result<()> {
        let scalars = self.0.scalars(step);
        let scale = tensor.grad.scale;
        let mut chunks: Vec<_> = state
            .iter_mut()
            .map(|values| values.f32_mut().chunks_mut(JOB))
            .collect();
        let jobs: Vec<_> = tensor
            .values
            .chunks_mut(JOB)
            .zip(tensor.grad.values.chunks(JOB))
            .map(|(values, grad)| {
                let moments: Vec<_> = chunks.iter_mut().filter_map(Iterator::next).collect();
                (values, grad, moments)
            })
            .collect();
        jobs.into_par_iter().for_each(|(values, grad, moments)| {
            let mut moments: Vec<_> = moments.into_iter().map(|m| m.chunks_mut(BLOCK)).collect();
            for (values, grad) in values.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)) {
                let mut moments: Vec<_> = moments.iter_mut().filter_map(Iterator::next).collect();
                R::update(
                    &scalars,
                    values,
                    &scaled(grad, scale)[..grad.len()],
                    &mut moments,
                );
            }
        });
        Ok(())
    }

    fn on_gpu(&self) -> Option<&dyn OnGpu> {
        Some(self)
    }
}

impl<R: Rule> OnGpu for Elementwise<R> {
    fn kernel(&self) -> Kernel {
        R::KERNEL
    }

    fn moments(&self) -> Vec<Moment> {
        self.0.moments()
    }

    fn keeps_bytes(&self, _: usize) -> bool {
        false
    }

    fn scalars(&self, step: Step) -> [u8; SCALAR_BYTES] {
        let mut bytes = [0; SCALAR_BYTES];
        bytes[..size_of::<R::Scalars>()].copy_from_slice(bytemuck::bytes_of(&self.0.scalars(step)));
        bytes
    }
}

/// `grad * scale`, for at most a block of elements.
pub(super) fn scaled(grad: &[f32], scale: f32) -> [f32; BLOCK] {
    let mut scaled = [0.0; BLOCK];
    for (to, from) in scaled.iter_mut().zip(grad) {
        *to = from * scale;
    }
    scaled
}
