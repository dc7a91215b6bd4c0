//! What a run needs of the machine's memory, checked before anything of that size is allocated.

use super::adapter::{self, Attached};
use super::base_weights::{activation_dtype, weight_format};
use super::{Recipe, fitting, host_memory};
use ferrotune_core::config::TrainConfig;
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::{
    ActivationPlan, DecoderConfig, Keep, ModelPlan, StepMemory, StepShape, WeightFormat, Workload,
};
use ferrotune_core::optimizer::OptimizerChoice;
use ferrotune_core::params::{ParamLayout, Segment};
use ferrotune_core::process_group::Place;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Device};
use std::path::Path;

/// Value and gradient of a trained scalar, f32 each.
const TRAINED_BYTES: u64 = 8;
/// The value in bf16.
const ROUNDED_BYTES: u64 = 2;

/// Bytes that the optimizer keeps of the tensors of `layout`, in memory and in a checkpoint.
pub(super) fn state_bytes(optimizer: &OptimizerChoice, layout: &ParamLayout) -> u64 {
    let of = |(_, segment): (_, &Segment)| optimizer.state_bytes_of(&segment.spec);
    layout.physical().map(of).sum()
}

/// Bytes that can be allocated on `device` now.
///
/// # Errors
/// The first failure of a GPU.
pub fn available_memory(device: &Device) -> Result<u64> {
    available(device)
}

/// What a rank may take of that: GPUs are one rank's each, a host's memory belongs to all of its ranks.
///
/// # Errors
/// The first failure of a GPU.
pub(super) fn share_of(device: &Device, place: Place) -> Result<u64> {
    let bytes = available(device)?;
    Ok(match device {
        Device::Cpu => divided(bytes, place),
        Device::Cuda(_) => bytes,
    })
}

/// Bytes a run needs at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// Frozen weights.
    pub(super) weights: u64,
    /// Trained values with gradients and the optimizer's state.
    pub(super) trained: u64,
    /// A step on the largest micro-batch, with as little kept as can be.
    pub(super) activations: u64,
}

impl Needs {
    pub(super) fn total(self) -> u64 {
        self.fixed().saturating_add(self.activations)
    }

    /// What does not depend on micro-batches.
    fn fixed(self) -> u64 {
        self.weights.saturating_add(self.trained)
    }
}

/// What is known of a run before its rows are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Base<'a> {
    pub(super) directory: &'a Path,
    pub(super) decoder: &'a DecoderConfig,
    pub(super) files: Option<&'a ModelFiles>,
    pub(super) device: &'a Device,
    /// Bytes that the host has for what layers keep.
    pub(super) host: u64,
}

impl<'a> Base<'a> {
    pub(super) fn of(recipe: &'a Recipe) -> Self {
        Self {
            directory: &recipe.base,
            decoder: &recipe.decoder,
            files: recipe.files.as_ref(),
            device: &recipe.device,
            host: host_share(recipe.place),
        }
    }

    /// What its linears are held in, where not as values.
    pub(super) fn held_as(&self, weights: &WeightFormat) -> Option<&'a str> {
        let in_files = self.files.and_then(ModelFiles::quantisation);
        in_files.or_else(|| weights.quantise.as_ref().map(|q| q.format.name()))
    }

    /// Shapes of the steps of a run as `config` says.
    fn step(&self, config: &TrainConfig, attached: &Attached, workload: &Workload) -> StepShape {
        let weights = weight_format(config, self.files, self.device);
        let activations = activation_dtype(config, weights.dtype, self.device);
        let attachments = &attached.attachments;
        let dtypes = [weights.dtype, activations];
        let step = StepShape::new(self.decoder, attachments, self.device, dtypes, workload);
        let step = match config.runtime.activation_offloading {
            Some(true) => step.with_offloading(),
            _ => step,
        };
        match self.held_as(&weights) {
            None => step,
            Some("int8") => step.with_int8_linears(),
            Some(_) => step.with_quantised_linears(),
        }
    }

    /// Memory for a step with `device` bytes: of the host's, half stays free for all else there.
    fn memory(&self, device: u64) -> StepMemory {
        StepMemory {
            device,
            host: self.host / 2,
        }
    }

    /// What a run as `config` says needs at least; without activations while nothing is known of its
    /// micro-batches.
    pub(super) fn needs(
        &self,
        config: &TrainConfig,
        attached: &Attached,
        workload: Option<&Workload>,
    ) -> Needs {
        let [weights, trained] = self.fixed_bytes(config, attached);
        let activations = workload.map_or(0, |workload| {
            let step = self.step(config, attached, workload);
            let least = match config.runtime.gradient_checkpointing {
                Some(true) => every_layer_again,
                _ => StepShape::smallest,
            };
            let plan = match config.runtime.activation_offloading {
                // The one that takes the least, as where nothing fits.
                None => step.offloaded_if_it_pays(self.memory(0), least),
                Some(_) => least(&step),
            };
            plan.bytes.total()
        });
        Needs {
            weights,
            trained,
            activations,
        }
    }

    /// Bytes of a method that are there for each adapter over one base: [what it trains and draws, what it makes of that
    /// in a pass].
    pub(super) fn method_bytes(&self, config: &TrainConfig, attached: &Attached) -> [u64; 2] {
        let [_, trained] = self.fixed_bytes(config, attached);
        let step = self.step(config, attached, &Workload::default());
        [trained + attached.frozen, step.of_method()]
    }

    /// Bytes of the weights, and of the trained values with gradients and the optimizer's state.
    pub(super) fn fixed_bytes(&self, config: &TrainConfig, attached: &Attached) -> [u64; 2] {
        let format = weight_format(config, self.files, self.device);
        let plan = ModelPlan::new(self.decoder);
        let margins = self.step(config, attached, &Workload::default()).margins();
        let held = format.bytes(&plan, &attached.attachments, self.files);
        let weights = margins + held + attached.frozen;
        let trainable = attached.trainable as u64;
        // Products of a GPU in bf16 read a rounded copy.
        let activations = activation_dtype(config, format.dtype, self.device);
        let rounded = self.device.is_cuda() && activations == DType::Bf16;
        let bytes = TRAINED_BYTES + if rounded { ROUNDED_BYTES } else { 0 };
        let optimizer = optimizer_bytes(config, &attached.layout, self.device);
        let trained = trainable.saturating_mul(bytes).saturating_add(optimizer);
        [weights, trained]
    }
}

/// Bytes on `device` of the optimizer's state, and of what an update of all tensors takes for as long as it lasts.
fn optimizer_bytes(config: &TrainConfig, layout: &ParamLayout, device: &Device) -> u64 {
    // A configuration that was read has none that cannot be made.
    let optimizer = config.optimizer.choice().unwrap_or_default();
    if device.is_cuda() && optimizer.needs_host() {
        return 0;
    }
    let scratch = |(_, segment): (_, &Segment)| optimizer.scratch_bytes(&segment.spec.shape);
    state_bytes(&optimizer, layout) + layout.physical().map(scratch).sum::<u64>()
}

/// The plan of `gradient_checkpointing: true`.
fn every_layer_again(step: &StepShape) -> ActivationPlan {
    step.predict(&vec![Keep::Input; step.layers()])
}

/// What a rank may take of the host's memory.
pub(super) fn host_share(place: Place) -> u64 {
    divided(host_memory::available(), place)
}

/// A rank's part of what all ranks of a machine share.
fn divided(bytes: u64, place: Place) -> u64 {
    bytes / place.local_world_size.max(1) as u64
}

/// What the method of a run attaches to its base.
///
/// # Errors
/// [`Error::Memory`] if weights and trained values do not fit.
pub(super) fn attach(config: &TrainConfig, base: Base<'_>) -> Result<Attached> {
    let available = available(base.device)?;
    // This also keeps the products of the layout small.
    if least_trained(config) > available {
        let needs = Needs {
            weights: 0,
            trained: least_trained(config),
            activations: 0,
        };
        let changes = fitting::changes(config, base, None, None, available);
        return Err(does_not_fit(needs, available, BEFORE_ROWS, &changes));
    }
    let attached = adapter::attach(config, base.directory, base.decoder)?;
    let needs = base.needs(config, &attached, None);
    if needs.total() > available {
        let changes = fitting::changes(config, base, Some(&attached), None, available);
        return Err(does_not_fit(needs, available, BEFORE_ROWS, &changes));
    }
    Ok(attached)
}

/// Bytes that the trained values of an adapter need whatever the model is: one adapted layer has at
/// least two scalars per rank.
pub(super) fn least_trained(config: &TrainConfig) -> u64 {
    if !config.lora.use_peft {
        return 0;
    }
    let optimizer = config.optimizer.choice().unwrap_or_default();
    // Of a matrix large enough for moments in bytes.
    let state = optimizer.state_bytes(&[64, 64]) / (64 * 64);
    (highest_rank(config) as u64).saturating_mul(2 * (TRAINED_BYTES + state))
}

/// The highest rank that a configuration names.
pub(super) fn highest_rank(config: &TrainConfig) -> usize {
    let lora = &config.lora;
    let patterns = lora.lora_rank_pattern.values().copied();
    patterns.fold(lora.lora_r, usize::max)
}

/// What each layer of a run keeps on a machine with `available` bytes, and a note for the user.
///
/// # Errors
/// [`Error::Memory`], with what would fit, if the run needs more whatever is kept.
pub(super) fn plan(
    recipe: &Recipe,
    attached: &Attached,
    available: u64,
) -> Result<(ActivationPlan, Option<String>)> {
    let base = Base::of(recipe);
    let needs = base.needs(&recipe.config, attached, Some(&recipe.workload));
    if needs.total() > available {
        let rows = fitting::Rows::of(recipe);
        let changes =
            fitting::changes(&recipe.config, base, Some(attached), Some(&rows), available);
        return Err(does_not_fit(needs, available, "", &changes));
    }
    let step = base.step(&recipe.config, attached, &recipe.workload);
    let ahead = |plan| step.ahead_for(plan, available, needs.fixed());
    let memory = base.memory(StepShape::usable(available, needs.fixed()));
    let runtime = &recipe.config.runtime;
    let [planned, again] = match runtime.activation_offloading {
        None => {
            let again = step.offloaded_if_it_pays(memory, every_layer_again);
            [step.plan_beside_host(memory), again]
        }
        Some(_) => [step.plan(memory), every_layer_again(&step)],
    };
    let forced = (runtime.gradient_checkpointing == Some(true)).then_some(again);
    let (planned, forced) = (ahead(planned), forced.map(ahead));
    require_host_memory(forced.as_ref().unwrap_or(&planned).host, base.host)?;
    match forced {
        Some(forced) if forced.cost() > planned.cost() => {
            let percent = |plan: &ActivationPlan| format!("{:.0} %", 100.0 * plan.cost());
            let note = format!(
                "gradient_checkpointing: true makes a step longer by about {}, where the memory there is asks for {}; \
                 leave it out to train faster",
                percent(&forced),
                percent(&planned)
            );
            Ok((forced, Some(note)))
        }
        Some(forced) => Ok((forced, None)),
        None => Ok((planned, None)),
    }
}

/// Refuses to move more to the host than this rank's share of its memory.
fn require_host_memory(host: u64, available: u64) -> Result<()> {
    if host <= available {
        return Ok(());
    }
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let message = format!(
        "`activation_offloading: true` moves at least {} of activations to host memory on each rank, of which {} are \
         available there; lower per_device_train_batch_size or max_length, or leave activation_offloading out, with which \
         no more layers move than find room",
        gib(host),
        gib(available)
    );
    Err(Error::Memory { message })
}

/// What is not known of a suggestion before the rows are.
const BEFORE_ROWS: &str = ", if the activations of the rows find room beside it";

/// `reserve` is what the `changes`, with which the run would fit, leave open.
fn does_not_fit(needs: Needs, available: u64, reserve: &str, changes: &[String]) -> Error {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let mut message = format!(
        "the run needs at least {} of memory (weights {}, trained values {}, activations {} with as little kept as \
         can be), {} are available",
        gib(needs.total()),
        gib(needs.weights),
        gib(needs.trained),
        gib(needs.activations),
        gib(available)
    );
    message += &match changes {
        [] => "; no smaller batch, length or rank fits: take a smaller model or a larger machine"
            .to_owned(),
        changes => format!("; what would fit{reserve}: {}", changes.join(", or ")),
    };
    Error::Memory { message }
}

/// Bytes that can be allocated where the run computes.
fn available(device: &Device) -> Result<u64> {
    match device {
        Device::Cpu => Ok(host_memory::available()),
        Device::Cuda(device) => Ok(device.memory_info()?.free as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_memory_for_activations_is_shared_by_the_ranks_of_a_machine() {
        let place = |ranks| Place {
            world_size: ranks,
            local_world_size: ranks,
            ..Place::SOLO
        };
        let require =
            |available, ranks| require_host_memory(3 << 30, divided(available, place(ranks)));
        assert!(require(3 << 30, 1).is_ok());
        let refused = require(4 << 30, 2).expect_err("too much");
        assert!(matches!(refused, Error::Memory { .. }), "{refused:?}");
        let said = refused.to_string();
        for word in [
            "activation_offloading: true",
            "3.0 GiB",
            "2.0 GiB",
            "leave activation_offloading out",
        ] {
            assert!(said.contains(word), "{said}");
        }
        assert!(!said.contains("  "), "{said}");
    }
}
