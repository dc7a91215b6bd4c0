//! Optimizers: what one keeps of a tensor from step to step, and how it changes the tensor by it.
//!
//! AdamW is one kernel over the flat buffers, on a CPU or a GPU ([`ferrotune_kernels::adamw`]). Every other is
//! an [`Optimizer`]: it sees one tensor at a time, in host memory. Those that treat every element alike are a
//! [`Rule`], of which [`Elementwise`] keeps the moments in f32 and [`EightBit`] as bytes; they are kernels on a GPU.
//!
//! Values and moments are f32; factors that are the same for a whole tensor are computed in f64, as PyTorch
//! computes them in Python. Results do not depend on the number of threads.

mod adadelta;
mod adafactor;
mod adagrad;
mod adam;
mod adamax;
mod ademamix;
mod eight_bit;
mod elementwise;
mod factored;
mod lion;
mod muon;
mod nadam;
mod radam;
mod registry;
mod rmsprop;
mod sgd;
mod state;
#[cfg(test)]
mod tests;
mod torch_adafactor;

pub use adadelta::Adadelta;
pub use adafactor::{Adafactor, LearningRate};
pub use adagrad::Adagrad;
pub use adam::Adam;
pub use adamax::Adamax;
pub use ademamix::AdEmaMix;
pub use eight_bit::{EightBit, Lookup};
pub use elementwise::{Elementwise, Moment, Rule};
pub use lion::Lion;
pub use muon::{AdjustLr, Muon};
pub use nadam::NAdam;
pub use radam::RAdam;
pub(crate) use registry::find;
pub use registry::{ADAM_KEYS, NOT_HERE, OPTIMIZERS, OptimizerEntry, Shared};
pub use rmsprop::RmsProp;
pub use sgd::Sgd;
pub use state::TensorStates;
pub use torch_adafactor::TorchAdafactor;

use crate::Result;
use crate::params::ParamSpec;
use ferrotune_kernels::adamw::AdamW;
use ferrotune_kernels::optimizer::{Rule as Kernel, SCALAR_BYTES};
use std::fmt::Debug;
use std::sync::Arc;

/// How the optimizer of a run computes.
#[derive(Clone, Debug)]
pub enum OptimizerChoice {
    /// One kernel over the flat buffers.
    AdamW(AdamW),
    /// Tensor by tensor, on the host but for what has a kernel.
    PerTensor(Arc<dyn Optimizer>),
}

impl OptimizerChoice {
    /// Tensor by tensor.
    pub fn per_tensor(optimizer: impl Optimizer + 'static) -> Self {
        Self::PerTensor(Arc::new(optimizer))
    }

    /// Whether it computes on the host, whatever the device.
    #[must_use]
    pub fn needs_host(&self) -> bool {
        matches!(self, Self::PerTensor(optimizer) if optimizer.on_gpu().is_none())
    }

    /// Bytes of the state of a tensor of `shape`.
    #[must_use]
    pub fn state_bytes(&self, shape: &[usize]) -> u64 {
        match self {
            Self::AdamW(_) => 8 * shape.iter().product::<usize>() as u64,
            Self::PerTensor(optimizer) => bytes_of(&optimizer.state(shape)),
        }
    }

    /// Bytes of the state of a tensor.
    #[must_use]
    pub fn state_bytes_of(&self, spec: &ParamSpec) -> u64 {
        match self {
            Self::AdamW(_) => self.state_bytes(&spec.shape),
            Self::PerTensor(optimizer) => {
                bytes_of(&for_tensor(optimizer.as_ref(), spec).state(&spec.shape))
            }
        }
    }

    /// Bytes that an update of a tensor of `shape` takes for as long as it lasts.
    #[must_use]
    pub fn scratch_bytes(&self, shape: &[usize]) -> u64 {
        match self {
            Self::AdamW(_) => 0,
            Self::PerTensor(optimizer) => optimizer.scratch_bytes(shape),
        }
    }
}

impl Default for OptimizerChoice {
    /// AdamW with PyTorch's constants.
    fn default() -> Self {
        Self::AdamW(AdamW::default())
    }
}

/// A rule for changing a tensor by its gradient.
pub trait Optimizer: Debug + Send + Sync {
    /// What is kept of a tensor of `shape`, zero before the first step.
    fn state(&self, shape: &[usize]) -> Vec<StateSpec>;

    /// Changes `tensor` and its `state`, which is as [`Optimizer::state`] says.
    ///
    /// # Errors
    /// If a product of its matrices fails.
    fn update(&self, tensor: Tensor<'_>, state: &mut [StateValues], step: Step) -> Result<()>;

    /// Bytes that an update takes for as long as it lasts, beside values, gradient and state.
    fn scratch_bytes(&self, shape: &[usize]) -> u64 {
        let _ = shape;
        0
    }

    /// The same with state in f32, for tables of embeddings; `None` if it is the same for them.
    fn for_tables(&self) -> Option<&dyn Optimizer> {
        None
    }

    /// How a GPU computes it, with the same state; `None` if that is left to the host.
    fn on_gpu(&self) -> Option<&dyn OnGpu> {
        None
    }
}

fn bytes_of(state: &[StateSpec]) -> u64 {
    state.iter().map(StateSpec::bytes).sum()
}

/// What updates a tensor of `spec`, where `optimizer` is asked for.
fn for_tensor<'a>(optimizer: &'a dyn Optimizer, spec: &ParamSpec) -> &'a dyn Optimizer {
    let for_tables = optimizer.for_tables().filter(|_| spec.is_table());
    for_tables.unwrap_or(optimizer)
}

/// An optimizer that treats every element alike, on a GPU ([`ferrotune_kernels::optimizer`]).
pub trait OnGpu {
    /// The kernel.
    fn kernel(&self) -> Kernel;

    /// What is kept of an element; in [`Optimizer::state`], each is one entry in f32, or bytes and their scales.
    fn moments(&self) -> Vec<Moment>;

    /// Whether moments of a tensor of `len` elements are bytes.
    fn keeps_bytes(&self, len: usize) -> bool;

    /// What is the same for all elements of a tensor in a step.
    fn scalars(&self, step: Step) -> [u8; SCALAR_BYTES];
}

/// A tensor in an update.
#[derive(Debug)]
pub struct Tensor<'a> {
    /// Dimensions; the last one is contiguous.
    pub shape: &'a [usize],
    /// Whether the matrix lies transposed to how PyTorch has it.
    pub transposed: bool,
    /// Its values.
    pub values: &'a mut [f32],
    /// Its gradient.
    pub grad: Gradient<'a>,
}

/// The gradient of a step: `values * scale`, which divides by the number of tokens and clips.
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a> {
    /// Sums over tokens.
    pub values: &'a [f32],
    /// What they are multiplied by.
    pub scale: f32,
}

impl Gradient<'_> {
    /// The gradient, element by element.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = f32> + '_ {
        self.values.iter().map(|value| value * self.scale)
    }
}

/// What a step says of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay; 0 for tensors that are not decayed.
    pub weight_decay: f64,
    /// Number of the step, from 1.
    pub number: u64,
}

/// Element type of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateType {
    /// f32.
    F32,
    /// Indices into a map of 256 values.
    U8,
}

/// One thing that is kept of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSpec {
    /// Its name, PyTorch's where it has one.
    pub name: String,
    /// Its element type.
    pub dtype: StateType,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl StateSpec {
    /// f32 values.
    pub fn f32(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            dtype: StateType::F32,
            shape: shape.into(),
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in memory and on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let each = match self.dtype {
            StateType::F32 => 4,
            StateType::U8 => 1,
        };
        each * self.len() as u64
    }
}

/// The values of a [`StateSpec`].
#[derive(Clone, Debug, PartialEq)]
pub enum StateValues {
    /// f32.
    F32(Vec<f32>),
    /// Indices.
    U8(Vec<u8>),
}

impl StateValues {
    /// Zeros, as `spec` has them.
    #[must_use]
    pub fn zeros(spec: &StateSpec) -> Self {
        match spec.dtype {
            StateType::F32 => Self::F32(vec![0.0; spec.len()]),
            StateType::U8 => Self::U8(vec![0; spec.len()]),
        }
    }

    /// The f32 values; none if they are bytes.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        match self {
            Self::F32(values) => values,
            Self::U8(_) => &mut [],
        }
    }

    /// The indices; none if they are f32.
    pub fn u8_mut(&mut self) -> &mut [u8] {
        match self {
            Self::U8(values) => values,
            Self::F32(_) => &mut [],
        }
    }

    /// As they lie in memory, little-endian.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice(values),
            Self::U8(values) => values,
        }
    }

    /// As they lie in memory, to be written.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice_mut(values),
            Self::U8(values) => values,
        }
    }
}
