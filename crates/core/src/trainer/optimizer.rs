//! Clipping and the optimizer with its state, on a CPU or a GPU.

use super::step::TrainerOptions;
use crate::Result;
use crate::io::TensorData;
use crate::optimizer::{OptimizerChoice, Step, TensorStates};
use crate::params::{FlatBuffer, ParamLayout, Segment};
use crate::process_group::ProcessGroup;
use ferrotune_kernels::Device;
use ferrotune_kernels::adamw::cuda::{Settings, Update};
use ferrotune_kernels::adamw::{self, AdamW, Group};
use ferrotune_kernels::linear_cross_entropy::{Accumulator, Sums};
use ferrotune_kernels::optimizer;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Tensors of a state as files have them, by name.
pub type StateTensors<'a> = BTreeMap<String, TensorData<'a>>;

/// An optimizer with what it remembers.
#[derive(Debug)]
pub(super) enum State {
    /// One kernel over the flat buffers.
    AdamW(Box<Moments>),
    /// Tensor by tensor.
    PerTensor(Box<PerTensor>),
}

/// Another optimizer, and what it keeps.
#[derive(Debug)]
pub(super) struct PerTensor {
    states: TensorStates,
    /// The norm of a step on a GPU, if that computes there.
    norm: Option<Update>,
}

/// `AdamW` and its moments.
#[derive(Debug)]
pub(super) struct Moments {
    adamw: AdamW,
    exp_avg: FlatBuffer,
    exp_avg_sq: FlatBuffer,
    /// The scalars of a step on a GPU; `None` on a CPU.
    scalars: Option<Update>,
}

/// What an update is made of besides the optimizer.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    /// The gradient is divided by it, for trained tokens.
    pub(super) divisor: f64,
    /// Norm above which it is scaled down.
    pub(super) max_norm: Option<f64>,
    pub(super) lr: f64,
    pub(super) weight_decay: f64,
    /// Number of the step, from 1.
    pub(super) step: u64,
    /// Loss and counts of this rank's micro-batches.
    pub(super) sums: &'a Accumulator,
}

impl Inputs<'_> {
    fn of(&self, segment: &Segment) -> Step {
        let spec = &segment.spec;
        Step {
            lr: self.lr * spec.lr_scale,
            weight_decay: if spec.weight_decay {
                self.weight_decay
            } else {
                0.0
            },
            number: self.step,
        }
    }

    /// Neighbouring segments with the same learning rate and decay as one range.
    fn groups(&self, layout: &ParamLayout) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (_, segment) in layout.physical() {
            let Step {
                lr,
                weight_decay,
                number,
            } = self.of(segment);
            match groups.last_mut() {
                Some(last) if last.lr == lr && last.weight_decay == weight_decay => {
                    last.range.end = segment.range().end;
                }
                _ => groups.push(Group {
                    range: segment.range(),
                    lr,
                    weight_decay,
                    step: number,
                }),
            }
        }
        groups
    }

    /// What a gradient of this norm is multiplied by.
    fn scale(&self, norm: f64) -> f32 {
        (clip_factor(self.max_norm, norm) / self.divisor) as f32
    }

    fn norm(&self, grads: &FlatBuffer) -> f64 {
        adamw::global_norm(grads.as_slice()) / self.divisor
    }
}

impl State {
    /// At step 0.
    pub(super) fn new(options: &TrainerOptions, layout: &Arc<ParamLayout>) -> Result<Self> {
        let norm = scalars(&options.device, layout);
        let adamw = match &options.optimizer {
            OptimizerChoice::PerTensor(optimizer) => {
                let states = TensorStates::new(Arc::clone(optimizer), layout, &options.device)?;
                let norm = norm.filter(|_| states.are_on_gpu());
                return Ok(Self::PerTensor(Box::new(PerTensor { states, norm })));
            }
            OptimizerChoice::AdamW(adamw) => *adamw,
        };
        let zeros = || FlatBuffer::zeros_on(layout, &options.device);
        Ok(Self::AdamW(Box::new(Moments {
            adamw,
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            scalars: norm,
        })))
    }

    /// Loads what an update on a GPU needs, and puts the moments where it finds them.
    pub(super) fn prepare(&self) -> Result<()> {
        let norm = match self {
            Self::AdamW(moments) => {
                let _ = (moments.exp_avg.home(), moments.exp_avg_sq.home());
                &moments.scalars
            }
            Self::PerTensor(per_tensor) => {
                per_tensor.states.prepare()?;
                &per_tensor.norm
            }
        };
        match norm {
            Some(update) => Ok(update.prepare()?),
            None => Ok(()),
        }
    }

    /// Divides, clips and applies the gradient, unless it or the loss is not finite; returns its norm before that,
    /// and this rank's sums.
    pub(super) fn update(
        &mut self,
        inputs: Inputs<'_>,
        params: &mut FlatBuffer,
        grads: &mut FlatBuffer,
    ) -> Result<(f64, Sums)> {
        if let Some(mut update) = self.on_gpu() {
            update.set(&inputs, params)?;
            update.issue(params, grads, inputs.sums)?;
            return update.read();
        }
        match self {
            Self::AdamW(moments) => moments.update(inputs, params, grads),
            Self::PerTensor(per_tensor) => per_tensor.update(inputs, params, grads),
        }
    }

    /// What an update on a GPU does without the host; `None` elsewhere.
    pub(super) fn on_gpu(&mut self) -> Option<OnGpu<'_>> {
        match self {
            Self::AdamW(moments) => Some(OnGpu {
                norm: moments.scalars.as_mut()?,
                rule: GpuRule::AdamW {
                    adamw: moments.adamw,
                    moments: [&mut moments.exp_avg, &mut moments.exp_avg_sq],
                },
            }),
            Self::PerTensor(per_tensor) => Some(OnGpu {
                norm: per_tensor.norm.as_mut()?,
                rule: GpuRule::PerTensor(&mut per_tensor.states),
            }),
        }
    }

    /// The state as files have it, `STATE.NAME` for each trainable tensor.
    pub(super) fn tensors(&self) -> StateTensors<'_> {
        match self {
            Self::AdamW(moments) => {
                let exp_avg = tensors_of("exp_avg", &moments.exp_avg);
                let exp_avg_sq = tensors_of("exp_avg_sq", &moments.exp_avg_sq);
                exp_avg.chain(exp_avg_sq).collect()
            }
            Self::PerTensor(per_tensor) => per_tensor.states.tensors().into_iter().collect(),
        }
    }

    /// Takes the state that [`State::tensors`] gave.
    pub(super) fn restore(&mut self, tensors: &StateTensors<'_>) {
        match self {
            Self::AdamW(moments) => {
                restore("exp_avg", &mut moments.exp_avg, tensors);
                restore("exp_avg_sq", &mut moments.exp_avg_sq, tensors);
            }
            Self::PerTensor(per_tensor) => {
                for (name, bytes) in per_tensor.states.bytes_mut() {
                    if let Some(tensor) = tensors.get(&name) {
                        bytes.copy_from_slice(&tensor.bytes);
                    }
                }
            }
        }
    }

    /// Takes the state of rank 0.
    pub(super) fn follow_first(&mut self, group: &mut dyn ProcessGroup) -> Result<()> {
        match self {
            Self::AdamW(moments) => {
                group.broadcast(&mut moments.exp_avg)?;
                group.broadcast(&mut moments.exp_avg_sq)
            }
            Self::PerTensor(per_tensor) => {
                for (_, bytes) in per_tensor.states.bytes_mut() {
                    let own: &[u8] = if group.rank() == 0 { bytes } else { &[] };
                    let all = group.all_gather(own)?;
                    bytes.copy_from_slice(&all[0]);
                }
                Ok(())
            }
        }
    }
}

impl Moments {
    fn update(
        &mut self,
        inputs: Inputs<'_>,
        params: &mut FlatBuffer,
        grads: &mut FlatBuffer,
    ) -> Result<(f64, Sums)> {
        let groups = inputs.groups(params.layout());
        let norm = inputs.norm(grads);
        if norm.is_finite() {
            adamw::step(
                &self.adamw,
                params.as_mut_slice(),
                grads.as_slice(),
                inputs.scale(norm),
                self.exp_avg.as_mut_slice(),
                self.exp_avg_sq.as_mut_slice(),
                &groups,
            )?;
        }
        Ok((norm, inputs.sums.read()?))
    }
}

impl PerTensor {
    fn update(
        &mut self,
        inputs: Inputs<'_>,
        params: &mut FlatBuffer,
        grads: &mut FlatBuffer,
    ) -> Result<(f64, Sums)> {
        let (norm, sums) = (inputs.norm(grads), inputs.sums.read()?);
        if norm.is_finite() && sums.loss.is_finite() {
            let (scale, step) = (inputs.scale(norm), |segment: &_| inputs.of(segment));
            self.states
                .update(params.as_mut_slice(), grads.as_slice(), scale, step)?;
        }
        Ok((norm, sums))
    }
}

/// An update on a GPU with nothing waited for before the end: a step waits for a GPU once. What changes from step
/// to step is [`OnGpu::set`]; what [`OnGpu::issue`] issues is the same in each, and can be recorded.
pub(super) struct OnGpu<'a> {
    norm: &'a mut Update,
    rule: GpuRule<'a>,
}

/// What is done with a gradient that is divided and clipped.
enum GpuRule<'a> {
    AdamW {
        adamw: AdamW,
        moments: [&'a mut FlatBuffer; 2],
    },
    PerTensor(&'a mut TensorStates),
}

impl OnGpu<'_> {
    /// Uploads the scalars of a step, and brings to the GPU what it updates. Copies on the host become old.
    pub(super) fn set(&mut self, inputs: &Inputs<'_>, params: &mut FlatBuffer) -> Result<()> {
        let mut settings = Settings {
            adamw: AdamW::default(),
            divisor: inputs.divisor,
            max_norm: inputs.max_norm,
        };
        let _ = params.home_and_rounded_mut();
        match &mut self.rule {
            GpuRule::AdamW { adamw, moments } => {
                settings.adamw = *adamw;
                for moment in moments {
                    let _ = moment.home_mut();
                }
                let groups = inputs.groups(params.layout());
                Ok(self.norm.set(&settings, &groups)?)
            }
            GpuRule::PerTensor(states) => {
                self.norm.set(&settings, &[])?;
                states.set(|segment| inputs.of(segment))
            }
        }
    }

    /// Divides, clips and applies the gradient, unless it or the loss is not finite.
    pub(super) fn issue(
        &mut self,
        params: &mut FlatBuffer,
        grads: &mut FlatBuffer,
        sums: &Accumulator,
    ) -> Result<()> {
        self.norm.norm_and_scale(grads.home(), Some(sums))?;
        let (params, shadow) = params.home_and_rounded_mut();
        match &mut self.rule {
            GpuRule::AdamW { moments, .. } => {
                let [m, v] = moments;
                let buffers = adamw::cuda::Buffers {
                    params,
                    grads: grads.home_mut(),
                    m: m.home_mut(),
                    v: v.home_mut(),
                    shadow,
                };
                self.norm.step(buffers, false)?;
            }
            GpuRule::PerTensor(states) => {
                let grads = grads.home();
                let buffers = optimizer::cuda::Buffers {
                    params,
                    grads,
                    shadow,
                };
                states.issue(self.norm, buffers)?;
            }
        }
        Ok(self.norm.keep_sums(sums)?)
    }

    /// The norm of the gradient before it was clipped, and this rank's sums. Waits for the GPU.
    pub(super) fn read(&self) -> Result<(f64, Sums)> {
        let (outcome, sums) = self.norm.read_with_sums()?;
        Ok((outcome.norm, sums))
    }

    /// Where what it keeps is in the memory of the GPU, as far as it can move.
    pub(super) fn addresses(&self) -> Vec<u64> {
        match &self.rule {
            GpuRule::AdamW { moments, .. } => {
                moments.iter().map(|buffer| buffer.addresses()[0]).collect()
            }
            GpuRule::PerTensor(_) => Vec::new(),
        }
    }
}

/// Room for a step's scalars on a GPU; `None` on a CPU.
fn scalars(device: &Device, layout: &ParamLayout) -> Option<Update> {
    match device {
        Device::Cpu => None,
        Device::Cuda(device) => {
            let segments = layout.physical().count();
            Some(Update::new(device, layout.len(), segments.max(1)))
        }
    }
}

/// Divides and clips the gradient if its norm is finite, on the host; returns the norm before that.
pub(super) fn clip(inputs: &Inputs<'_>, grads: &mut FlatBuffer) -> f64 {
    let norm = inputs.norm(grads);
    if norm.is_finite() {
        let factor = inputs.scale(norm);
        grads.as_mut_slice().iter_mut().for_each(|g| *g *= factor);
    }
    norm
}

/// torch.nn.utils.clip_grad_norm_: `max_norm / (norm + 1e-6)`, at most 1.
pub(super) fn clip_factor(max_norm: Option<f64>, norm: f64) -> f64 {
    max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0))
}

/// A buffer of the layout as `STATE.NAME` for each trainable tensor.
pub(super) fn tensors_of<'a>(
    state: &'a str,
    buffer: &'a FlatBuffer,
) -> impl Iterator<Item = (String, TensorData<'a>)> {
    let tensor = move |(id, segment): (_, &Segment)| {
        let data = TensorData::from_f32(buffer.get(id), segment.spec.shape.clone());
        (format!("{state}.{}", segment.spec.name), data)
    };
    buffer.layout().by_name().map(tensor)
}

/// Takes into a buffer what [`tensors_of`] gave.
pub(super) fn restore(state: &str, buffer: &mut FlatBuffer, tensors: &StateTensors<'_>) {
    let layout = Arc::clone(buffer.layout());
    for (id, segment) in layout.by_name() {
        if let Some(tensor) = tensors.get(&format!("{state}.{}", segment.spec.name)) {
            bytemuck::cast_slice_mut(buffer.get_mut(id)).copy_from_slice(&tensor.bytes);
        }
    }
}
