//! What a run needs of the machine's memory, checked before anything of that size is allocated.

use super::{Recipe, activation_dtype, adapter, fitting, host_memory, weight_dtype};
use ferrotune_core::config::TrainConfig;
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::Device;
use std::path::Path;

/// Value, gradient and two moments of a trained scalar, f32 each.
const TRAINED_BYTES: u64 = 16;

/// Bytes a run needs at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// Frozen weights, or the base's copy of trained ones.
    pub(super) weights: u64,
    /// Trained values with gradients and moments.
    pub(super) trained: u64,
    /// Saved activations of the largest micro-batch, and the buffers of one layer's backward.
    pub(super) activations: u64,
}

impl Needs {
    pub(super) fn total(self) -> u64 {
        self.weights
            .saturating_add(self.trained)
            .saturating_add(self.activations)
    }

    /// The needs of a recipe.
    pub(super) fn of(recipe: &Recipe) -> Self {
        let base = Base::of(recipe);
        base.needs(&recipe.config, recipe.trainable, recipe.max_tokens)
    }
}

/// What is known of a run before its rows are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Base<'a> {
    pub(super) directory: &'a Path,
    pub(super) decoder: &'a DecoderConfig,
    pub(super) files: Option<&'a ModelFiles>,
    pub(super) device: &'a Device,
}

impl<'a> Base<'a> {
    pub(super) fn of(recipe: &'a Recipe) -> Self {
        Self {
            directory: &recipe.base,
            decoder: &recipe.decoder,
            files: recipe.files.as_ref(),
            device: &recipe.device,
        }
    }

    /// The needs of a run as `config` says, with micro-batches of at most `max_tokens`.
    pub(super) fn needs(&self, config: &TrainConfig, trainable: usize, max_tokens: usize) -> Needs {
        let d = self.decoder;
        let saved =
            2 * d.hidden_size + 2 * d.q_width() + 2 * d.kv_width() + 2 * d.intermediate_size;
        let working =
            3 * d.hidden_size + 2 * d.intermediate_size + 2 * d.q_width() + 2 * d.kv_width();
        let weight_dtype = weight_dtype(config, self.files, self.device);
        let bytes = activation_dtype(config, weight_dtype, self.device).bytes();
        let per_token = (bytes * (d.layers * saved + working)) as u64;
        let weights = d.parameters() * weight_dtype.bytes();
        Needs {
            weights: weights as u64,
            trained: (trainable as u64).saturating_mul(TRAINED_BYTES),
            activations: per_token.saturating_mul(max_tokens as u64),
        }
    }
}

/// Trainable scalars of a run, and notes about them for the user.
///
/// # Errors
/// [`Error::Memory`] if weights and trained values do not fit.
pub(super) fn trainable(config: &TrainConfig, base: Base<'_>) -> Result<(usize, Vec<String>)> {
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
    let needs = base.needs(config, attached.trainable, 0);
    if needs.total() > available {
        let trainable = Some(attached.trainable);
        let changes = fitting::changes(config, base, trainable, None, available);
        return Err(does_not_fit(needs, available, BEFORE_ROWS, &changes));
    }
    Ok((attached.trainable, attached.notes))
}

/// Bytes that the trained values of an adapter need whatever the model is: one adapted layer has at
/// least two scalars per rank.
pub(super) fn least_trained(config: &TrainConfig) -> u64 {
    if !config.lora.use_peft {
        return 0;
    }
    (highest_rank(config) as u64).saturating_mul(2 * TRAINED_BYTES)
}

/// The highest rank that a configuration names.
pub(super) fn highest_rank(config: &TrainConfig) -> usize {
    let lora = &config.lora;
    let patterns = lora.lora_rank_pattern.values().copied();
    patterns.fold(lora.lora_r, usize::max)
}

/// Refuses a run that needs more bytes than there are.
///
/// # Errors
/// [`Error::Memory`], with what would fit.
pub(super) fn check(recipe: &Recipe) -> Result<()> {
    check_against(recipe, available(&recipe.device)?)
}

/// [`check`] on a machine with `available` bytes.
pub(super) fn check_against(recipe: &Recipe, available: u64) -> Result<()> {
    let needs = Needs::of(recipe);
    if needs.total() <= available {
        return Ok(());
    }
    let changes = fitting::changes_of(recipe, available);
    Err(does_not_fit(needs, available, "", &changes))
}

/// What is not known of a suggestion before the rows are.
const BEFORE_ROWS: &str = ", if the activations of the rows find room beside it";

/// `reserve` is what the `changes`, with which the run would fit, leave open.
fn does_not_fit(needs: Needs, available: u64, reserve: &str, changes: &[String]) -> Error {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let mut message = format!(
        "the run needs at least {} of memory (weights {}, trained values {}, activations {}), {} are \
         available",
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
