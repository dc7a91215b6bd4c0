//! AdamW on a GPU, without waiting for it.
//!
//! What changes from step to step lies in GPU memory ([`Update::set`]), and so does what the GPU
//! finds out ([`Update::read`]). What is in between, [`Update::norm_and_scale`], [`Update::step`] and
//! [`Update::keep_sums`], is the same from step to step and can be captured in a graph.

#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::{AdamW, Group, check_config, check_groups};
use crate::cuda::{CudaDevice, Grid, Memory, Module};
use crate::error::{check_dtype, check_shape};
use crate::linear_cross_entropy::{Accumulator, DeviceSums, Sums};
use crate::{DType, Error, Result, View, ViewMut};
use std::sync::Arc;

pub(crate) static MODULE: Module = Module {
    name: "adamw",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 256;
/// Elements of a block of `step`; `SPAN` of the kernels.
const SPAN: usize = 4096;
/// Elements that a block of the norm takes at least, and most blocks of it.
const NORM_SPAN: usize = 16 * 1024;
const NORM_BLOCKS: usize = 1024;

/// What a step found out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Euclidean norm of the gradient divided by [`Settings::divisor`], before clipping.
    pub norm: f64,
    /// Whether norm and loss are finite. If not, nothing was updated.
    pub finite: bool,
}

/// What a step needs besides its groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// The constants of the moments.
    pub adamw: AdamW,
    /// What the gradient is divided by: the number of trained tokens.
    pub divisor: f64,
    /// Norm above which the gradient is scaled down; `None` never does.
    pub max_norm: Option<f64>,
}

/// The flat buffers of a step, each `[1, len]` on the same GPU.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// f32, updated.
    pub params: ViewMut<'a>,
    /// f32, cleared if asked for.
    pub grads: ViewMut<'a>,
    /// f32, first moment, updated.
    pub m: ViewMut<'a>,
    /// f32, second moment, updated.
    pub v: ViewMut<'a>,
    /// bf16, receives a copy of every parameter that was updated.
    pub shadow: Option<ViewMut<'a>>,
}

/// The scalars of optimizer steps on one GPU.
#[derive(Debug)]
pub struct Update {
    len: usize,
    max_groups: usize,
    settings: Memory,
    outcome: Memory,
    partial: Memory,
}

impl Update {
    /// For flat buffers of `len` elements in at most `max_groups` groups.
    #[must_use]
    pub fn new(device: &Arc<CudaDevice>, len: usize, max_groups: usize) -> Self {
        let table = size_of::<DeviceSettings>() + max_groups * size_of::<DeviceGroup>();
        Self {
            len,
            max_groups,
            settings: device.alloc(table),
            outcome: device.alloc(size_of::<Answer>()),
            partial: device.alloc(norm_blocks(len) * size_of::<f64>()),
        }
    }

    /// Uploads what the steps from now on use. Groups come in any order.
    ///
    /// # Errors
    /// If a group leaves the buffer, overlaps another or has step 0, there are too many, or a
    /// constant is out of its range; the first failure of the GPU.
    pub fn set(&mut self, settings: &Settings, groups: &[Group]) -> Result<()> {
        const OP: &str = "adamw::cuda::set";
        check_config(OP, &settings.adamw)?;
        let mut ordered: Vec<&Group> = groups.iter().filter(|g| !g.range.is_empty()).collect();
        ordered.sort_by_key(|group| group.range.start);
        check_groups(OP, &ordered, self.len)?;
        if ordered.len() > self.max_groups {
            let message = format!("{} groups, made for {}", ordered.len(), self.max_groups);
            return Err(Error::Invalid { op: OP, message });
        }
        let header = DeviceSettings::new(settings, ordered.len());
        let mut bytes = bytemuck::bytes_of(&header).to_vec();
        for group in ordered {
            let entry = DeviceGroup::new(&settings.adamw, group);
            bytes.extend_from_slice(bytemuck::bytes_of(&entry));
        }
        self.device().upload(self.settings.ptr(), &bytes)
    }

    /// Norm of `grads [1, len]` f32, and the factor that divides and clips it:
    /// `min(1, max_norm / (norm + 1e-6)) / divisor`. A `loss` that is not finite stops the update.
    ///
    /// # Errors
    /// If the shape, dtype or device does not fit; the first failure of the GPU.
    pub fn norm_and_scale(&mut self, grads: View<'_>, loss: Option<&Accumulator>) -> Result<()> {
        const OP: &str = "adamw::cuda::norm_and_scale";
        self.check(OP, "grads", grads, DType::F32)?;
        let blocks = norm_blocks(self.len);
        let squares = Squares {
            grads: grads.ptr(),
            partial: self.partial.ptr(),
            len: self.len as u64,
        };
        let grid = Grid::new(blocks as u32, THREADS);
        self.device()
            .launch(&MODULE, "adamw_sum_of_squares", grid, &squares)?;
        let scale = Scale {
            settings: self.settings.ptr(),
            partial: self.partial.ptr(),
            loss: loss.and_then(Accumulator::memory).map_or(0, Memory::ptr),
            outcome: self.outcome.ptr(),
            partials: blocks as u64,
        };
        let grid = Grid::new(1, THREADS);
        self.device().launch(&MODULE, "adamw_scale", grid, &scale)
    }

    /// One update of the parameters of all groups, after [`Update::norm_and_scale`]; elements of no
    /// group stay as they are. With `zero_grads` all gradients are 0 afterwards, also where norm or
    /// loss was not finite.
    ///
    /// # Errors
    /// If a shape, dtype or device does not fit; the first failure of the GPU.
    pub fn step(&mut self, buffers: Buffers<'_>, zero_grads: bool) -> Result<()> {
        const OP: &str = "adamw::cuda::step";
        let f32s = [
            ("params", buffers.params.as_view()),
            ("grads", buffers.grads.as_view()),
            ("m", buffers.m.as_view()),
            ("v", buffers.v.as_view()),
        ];
        for (what, view) in f32s {
            self.check(OP, what, view, DType::F32)?;
        }
        let shadow = buffers.shadow.as_ref().map(ViewMut::as_view);
        if let Some(shadow) = shadow {
            self.check(OP, "shadow", shadow, DType::Bf16)?;
        }
        let shadow = shadow.map_or(0, |shadow| shadow.ptr());
        let aligned = |view: View<'_>| view.ptr().is_multiple_of(16);
        let vectors = f32s.iter().all(|&(_, view)| aligned(view)) && shadow.is_multiple_of(8);
        let params = Step {
            settings: self.settings.ptr(),
            groups: self.settings.ptr() + size_of::<DeviceSettings>() as u64,
            outcome: self.outcome.ptr(),
            params: buffers.params.ptr(),
            grads: buffers.grads.ptr(),
            m: buffers.m.ptr(),
            v: buffers.v.ptr(),
            shadow,
            len: self.len as u64,
            vectors: u32::from(vectors),
            zero_grads: u32::from(zero_grads),
        };
        let grid = Grid::new(self.len.div_ceil(SPAN) as u32, THREADS);
        self.device().launch(&MODULE, "adamw_step", grid, &params)
    }

    /// What the last step found out. Waits for the GPU.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn read(&self) -> Result<Outcome> {
        let mut outcome = DeviceOutcome::default();
        let bytes = bytemuck::bytes_of_mut(&mut outcome);
        self.device().download(bytes, self.outcome.ptr())?;
        Ok(outcome.into())
    }

    /// Puts the sums of the step where [`Update::read_with_sums`] finds them.
    ///
    /// # Errors
    /// If `sums` are not on this GPU; the first failure of the GPU.
    pub fn keep_sums(&mut self, sums: &Accumulator) -> Result<()> {
        const OP: &str = "adamw::cuda::keep_sums";
        let memory = sums.memory();
        crate::device::common(OP, &[Some(self.device()), memory.map(Memory::device)])?;
        let behind = self.outcome.ptr() + size_of::<DeviceOutcome>() as u64;
        let from = memory.map_or(0, Memory::ptr);
        self.device().copy(behind, from, size_of::<DeviceSums>())
    }

    /// [`Update::read`], and in the same answer the sums after [`Update::keep_sums`]. Waits for the GPU once.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn read_with_sums(&self) -> Result<(Outcome, Sums)> {
        let mut answer = Answer::default();
        let bytes = bytemuck::bytes_of_mut(&mut answer);
        self.device().download(bytes, self.outcome.ptr())?;
        Ok((answer.outcome.into(), answer.sums.into()))
    }

    /// Loads the kernels, so that the first step does not wait for the compiler.
    ///
    /// # Errors
    /// If they do not compile or load.
    pub fn prepare(&self) -> Result<()> {
        self.device().prepare(&MODULE)
    }

    /// Where the GPU finds what [`Update::norm_and_scale`] found out.
    pub(crate) fn outcome(&self) -> u64 {
        self.outcome.ptr()
    }

    fn device(&self) -> &Arc<CudaDevice> {
        self.settings.device()
    }

    fn check(
        &self,
        op: &'static str,
        what: &'static str,
        view: View<'_>,
        dtype: DType,
    ) -> Result<()> {
        check_shape(op, what, [1, self.len], view.shape())?;
        check_dtype(op, what, dtype, view.dtype())?;
        crate::device::common(op, &[Some(self.device()), view.device()]).map(|_| ())
    }
}

/// Blocks of the norm; its order of summation depends on them.
fn norm_blocks(len: usize) -> usize {
    len.div_ceil(NORM_SPAN).clamp(1, NORM_BLOCKS)
}

/// `struct Settings` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct DeviceSettings {
    divisor: f64,
    max_norm: f64,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    eps: f32,
    groups: u32,
}

impl DeviceSettings {
    fn new(settings: &Settings, groups: usize) -> Self {
        let AdamW { beta1, beta2, eps } = settings.adamw;
        Self {
            divisor: settings.divisor,
            max_norm: settings.max_norm.unwrap_or(f64::INFINITY),
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            eps: eps as f32,
            groups: groups as u32,
        }
    }
}

/// `struct Group` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct DeviceGroup {
    start: u64,
    end: u64,
    keep: f32,
    step_size: f32,
    inverse_sqrt_bias2: f32,
    unused: u32,
}

impl DeviceGroup {
    fn new(cfg: &AdamW, group: &Group) -> Self {
        let scalars = super::cpu::Scalars::new(cfg, group, 1.0);
        Self {
            start: group.range.start as u64,
            end: group.range.end as u64,
            keep: scalars.keep,
            step_size: scalars.step_size,
            inverse_sqrt_bias2: scalars.inverse_sqrt_bias2,
            unused: 0,
        }
    }
}

/// `struct Outcome` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct DeviceOutcome {
    norm: f64,
    grad_scale: f32,
    finite: u32,
}

impl From<DeviceOutcome> for Outcome {
    fn from(outcome: DeviceOutcome) -> Self {
        Self {
            norm: outcome.norm,
            finite: outcome.finite != 0,
        }
    }
}

/// What is read at the end of a step.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct Answer {
    outcome: DeviceOutcome,
    sums: DeviceSums,
}

/// `struct Squares` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Squares {
    grads: u64,
    partial: u64,
    len: u64,
}

/// `struct Scale` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Scale {
    settings: u64,
    partial: u64,
    loss: u64,
    outcome: u64,
    partials: u64,
}

/// `struct Update` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    settings: u64,
    groups: u64,
    outcome: u64,
    params: u64,
    grads: u64,
    m: u64,
    v: u64,
    shadow: u64,
    len: u64,
    vectors: u32,
    zero_grads: u32,
}
