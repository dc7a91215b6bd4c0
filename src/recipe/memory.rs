//! What a run needs of the machine's memory, checked before anything of that size is allocated.

use super::adapter_of;
use ferrotune_core::config::TrainConfig;
use ferrotune_core::model::{DecoderConfig, ModelPlan};
use ferrotune_core::params::ParamLayoutBuilder;
use ferrotune_core::{Error, Result};
use std::path::Path;

/// What is assumed where the machine does not say: 16 TiB.
const UNKNOWN: u64 = 1 << 44;
/// Value, gradient and two moments of a trained scalar, f32 each.
const TRAINED_BYTES: u64 = 16;

/// Trainable scalars of a run, counted without room for them.
///
/// # Errors
/// [`Error::Memory`] if their values, gradients and moments do not fit.
pub(super) fn trainable(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
) -> Result<usize> {
    // One adapted layer has at least two scalars per rank; this also keeps the products below small.
    if config.lora.use_peft {
        let patterns = config.lora.lora_rank_pattern.clone().into_iter();
        let ranks = patterns.map(|(_, rank)| rank).chain([config.lora.lora_r]);
        let rank = ranks.max().unwrap_or(0) as u64;
        check(rank.saturating_mul(2 * TRAINED_BYTES))?;
    }
    let mut builder = ParamLayoutBuilder::new();
    adapter_of(config, base, decoder)?.attach(&ModelPlan::new(decoder).sites, &mut builder)?;
    let trainable = builder.build()?.trainable();
    check((trainable as u64).saturating_mul(TRAINED_BYTES))?;
    Ok(trainable)
}

/// Refuses to need more bytes than there are.
pub(super) fn check(needed: u64) -> Result<()> {
    let available = available();
    if needed <= available {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let message = format!(
        "the run needs at least {:.1} GiB of memory, {:.1} GiB are available; lower lora_r, \
         max_length or per_device_train_batch_size",
        gib(needed),
        gib(available)
    );
    Err(Error::Memory { message })
}

/// Bytes that can be allocated without swapping, as the system or its control group says.
fn available() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let meminfo = read("/proc/meminfo");
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    let machine = kib.map_or(UNKNOWN, |kib| kib.saturating_mul(1024));
    let group = read("/sys/fs/cgroup/memory.max").trim().parse::<u64>();
    machine.min(group.unwrap_or(UNKNOWN)).min(UNKNOWN)
}
