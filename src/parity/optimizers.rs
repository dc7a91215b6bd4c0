//! Optimizers on gradients that are given: no model, no loss.

mod recorded;

use super::case::Case;
use super::compare::{Comparison, relative_error};
use ferrotune_core::io::{FileDType, SafetensorsFile};
use ferrotune_core::optimizer::{OptimizerChoice, Step, TensorStates};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::Device;
use ferrotune_kernels::adamw::cuda::{Settings, Update};
use ferrotune_kernels::adamw::{self, AdamW, Group};
use ferrotune_kernels::optimizer::cuda::Buffers;
use recorded::Recorded;
use serde_json::Value;
use std::sync::Arc;

/// Some steps of f32 of the largest value.
const F32: f64 = 1e-6;
/// Two steps of bf16, of how far values have come: where products are in bf16, sums in another order round to others.
const BF16: f64 = 1.0 / 128.0;
/// Sums in another order, of scales.
const SCALES: f64 = 1e-6;
/// Share of the bytes of a moment that rounding may take to the entry beside.
const BYTES: f64 = 1e-3;

/// A parameter on its way: values, and what the optimizer keeps.
struct Run {
    params: FlatBuffer,
    grads: FlatBuffer,
    moments: [FlatBuffer; 2],
    states: Option<TensorStates>,
    /// The scale of gradients on a GPU, if the optimizer computes there.
    norm: Option<Update>,
    recorded: Recorded,
}

impl Run {
    fn new(
        recorded: Recorded,
        start: &[(String, Vec<usize>, Vec<f32>)],
        device: &Device,
    ) -> Result<Self> {
        let mut builder = ParamLayoutBuilder::new();
        let specs = start.iter().enumerate();
        let ids: Vec<_> = specs
            .map(|(order, (name, shape, _))| {
                builder.add(ParamSpec::new(name.clone(), shape.clone(), order))
            })
            .collect();
        let layout = builder.build()?;
        let mut params = FlatBuffer::zeros(&layout);
        for (id, (_, _, values)) in ids.into_iter().zip(start) {
            params.get_mut(id).copy_from_slice(values);
        }
        let states = match &recorded.optimizer {
            OptimizerChoice::PerTensor(one) => {
                Some(TensorStates::new(Arc::clone(one), &layout, device)?)
            }
            OptimizerChoice::AdamW(_) => None,
        };
        let norm = match (device, &states) {
            (Device::Cuda(device), Some(states)) if states.are_on_gpu() => {
                params.move_to(&Device::Cuda(Arc::clone(device)));
                Some(Update::new(device, layout.len(), 1))
            }
            _ => None,
        };
        Ok(Self {
            grads: FlatBuffer::zeros_on(&layout, params.device()),
            params,
            norm,
            moments: [FlatBuffer::zeros(&layout), FlatBuffer::zeros(&layout)],
            states,
            recorded,
        })
    }

    /// Step `number`, from 1, by the gradients called `name(parameter)`.
    fn step(
        &mut self,
        number: u64,
        gradients: &SafetensorsFile,
        name: impl Fn(&str) -> String,
    ) -> Result<()> {
        let layout = Arc::clone(self.params.layout());
        for (id, segment) in layout.by_name() {
            let values = gradients.read_f32(&name(&segment.spec.name))?;
            let to = self.grads.get_mut(id);
            if to.len() != values.len() {
                let message = format!("a gradient of {} has another length", segment.spec.name);
                return Err(Error::data(gradients.path(), None, message));
            }
            to.copy_from_slice(&values);
        }
        let scale = if self.recorded.maximize { -1.0 } else { 1.0 };
        let step = Step {
            lr: self.recorded.lr,
            weight_decay: self.recorded.weight_decay,
            number,
        };
        if let (Some(norm), Some(states)) = (&mut self.norm, &mut self.states) {
            let settings = Settings {
                adamw: AdamW::default(),
                divisor: f64::from(scale),
                max_norm: None,
            };
            norm.set(&settings, &[])?;
            norm.norm_and_scale(self.grads.home(), None)?;
            states.set(|_| step)?;
            let buffers = Buffers {
                params: self.params.home_mut(),
                grads: self.grads.home(),
                shadow: None,
            };
            return states.issue(norm, buffers);
        }
        let (params, grads) = (self.params.as_mut_slice(), self.grads.as_slice());
        match (&mut self.states, &self.recorded.optimizer) {
            (Some(states), _) => states.update(params, grads, scale, |_| step),
            (None, OptimizerChoice::AdamW(constants)) => {
                let group = Group {
                    range: 0..layout.len(),
                    lr: step.lr,
                    weight_decay: step.weight_decay,
                    step: number,
                };
                let [m, v] = &mut self.moments;
                let (m, v) = (m.as_mut_slice(), v.as_mut_slice());
                adamw::step(constants, params, grads, scale, m, v, &[group])?;
                Ok(())
            }
            (None, OptimizerChoice::PerTensor(_)) => Ok(()),
        }
    }
}

/// Optimizers of PyTorch, Transformers and bitsandbytes, on a few small tensors.
pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let (inputs, expected) = files(case)?;
    let mut c = Comparison::default();
    let start: Vec<_> = (0..)
        .map(|j| format!("p{j}"))
        .take_while(|name| inputs.meta(name).is_some())
        .map(|name| tensor(&inputs, &name))
        .collect::<Result<_>>()?;
    let steps = (0..).take_while(|k| inputs.meta(&format!("step{k}.g0")).is_some());
    let steps = steps.count() as u64;
    for recorded in recorded::list(case, "optimizers")? {
        let name = recorded.name.clone();
        let in_bf16 = recorded.in_bf16;
        let mut run = Run::new(recorded, &start, &case.device)?;
        let mut compared = 0;
        for step in 1..=steps {
            let gradient = |p: &str| format!("step{}.g{}", step - 1, &p[1..]);
            run.step(step, &inputs, gradient)?;
            for (id, segment) in run.params.layout().by_name() {
                let key = format!("{name}.after{step}.{}", segment.spec.name);
                if expected.meta(&key).is_some() {
                    let theirs = expected.read_f32(&key)?;
                    let from = start.iter().find(|(name, ..)| *name == segment.spec.name);
                    let moved = from.map_or(0.0, |(_, _, from)| relative_error(from, &theirs));
                    let tolerance = if in_bf16 { F32.max(BF16 * moved) } else { F32 };
                    c.tensor(&name, &key, run.params.get(id), &theirs, tolerance);
                    compared += 1;
                }
            }
        }
        require_all(&expected, &format!("{name}.after"), compared)?;
    }
    Ok(c)
}

/// Optimizers of bitsandbytes with moments in bytes, on one tensor.
pub(super) fn compare_eight_bit(case: &Case) -> Result<Comparison> {
    let (inputs, expected) = files(case)?;
    let mut c = Comparison::default();
    let start = [tensor(&inputs, "p0")?];
    let steps = (0..).take_while(|k| inputs.meta(&format!("g{k}")).is_some());
    let steps = steps.count() as u64;
    for recorded in recorded::list(case, "ok")? {
        let name = recorded.name.clone();
        let mut run = Run::new(recorded, &start, &case.device)?;
        let mut compared = 0;
        for step in 1..=steps {
            run.step(step, &inputs, |_| format!("g{}", step - 1))?;
            let key = format!("{name}.after{step}.p");
            if expected.meta(&key).is_some() {
                let theirs = expected.read_f32(&key)?;
                c.tensor("parameters", &key, run.params.as_slice(), &theirs, F32);
                compared += 1;
            }
        }
        require_all(&expected, &format!("{name}.after"), compared)?;
        compare_state(&mut c, &run, &expected)?;
    }
    Ok(c)
}

/// Bytes, scales and maps of a state, where they were recorded.
fn compare_state(c: &mut Comparison, run: &Run, expected: &SafetensorsFile) -> Result<()> {
    let prefix = format!("{}.state.", run.recorded.name);
    let states: Vec<_> = run.states.iter().flat_map(TensorStates::tensors).collect();
    for signed in [true, false] {
        let name = format!("{prefix}qmap{}", if signed { 1 } else { 2 });
        if expected.meta(&name).is_some() {
            let map = ferrotune_kernels::dequantise::dynamic_map(signed);
            c.tensor("maps", &name, &map, &expected.read_f32(&name)?, 0.0);
        }
    }
    for (at, pair) in states.chunks(2).enumerate() {
        let [(_, bytes), (_, scales)] = pair else {
            continue;
        };
        let name = |part: &str| format!("{prefix}{part}{}", at + 1);
        let recorded = |name: &str| expected.meta(name).map(|meta| meta.dtype);
        if recorded(&name("state")) == Some(FileDType::U8) && bytes.dtype == FileDType::U8 {
            let theirs = expected.read_bytes(&name("state"))?;
            let pairs = bytes.bytes.iter().zip(&theirs);
            let apart = pairs.clone().map(|(a, b)| a.abs_diff(*b)).max();
            let others = pairs.filter(|(a, b)| a != b).count();
            let near = bytes.bytes.len() == theirs.len() && apart.unwrap_or(0) <= 1;
            let share = others as f64 / theirs.len().max(1) as f64;
            let error = if near { share } else { f64::INFINITY };
            c.error("bytes", &name("state"), error, BYTES);
        }
        if recorded(&name("absmax")).is_some() {
            let theirs = expected.read_f32(&name("absmax"))?;
            let words = scales.bytes.as_chunks().0.iter();
            let ours: Vec<f32> = words.map(|word| f32::from_le_bytes(*word)).collect();
            c.tensor("scales", &name("absmax"), &ours, &theirs, SCALES);
        }
    }
    Ok(())
}

fn files(case: &Case) -> Result<(SafetensorsFile, SafetensorsFile)> {
    Ok((
        SafetensorsFile::open(case.path("inputs.safetensors"))?,
        SafetensorsFile::open(case.path("expected.safetensors"))?,
    ))
}

/// Name, shape and values of a tensor.
fn tensor(file: &SafetensorsFile, name: &str) -> Result<(String, Vec<usize>, Vec<f32>)> {
    let values = file.read_f32(name)?;
    let shape = file.meta(name).map(|meta| meta.shape.clone());
    Ok((name.to_owned(), shape.unwrap_or_default(), values))
}

/// Refuses a recording of which something was not compared, or nothing.
fn require_all(expected: &SafetensorsFile, prefix: &str, compared: usize) -> Result<()> {
    let recorded = expected
        .names()
        .filter(|name| name.starts_with(prefix))
        .count();
    if compared == recorded && compared > 0 {
        return Ok(());
    }
    let message = format!("{compared} of {recorded} tensors called `{prefix}*` could be compared");
    Err(Error::data(expected.path(), None, message))
}

/// A value of case.json, which may stand in a string as Python shows it.
fn plain(value: &Value) -> Value {
    match value {
        Value::String(text) => {
            let json = text
                .replace('(', "[")
                .replace(')', "]")
                .replace("None", "null");
            let json = json.replace("True", "true").replace("False", "false");
            serde_json::from_str(&json).unwrap_or_else(|_| value.clone())
        }
        other => other.clone(),
    }
}
