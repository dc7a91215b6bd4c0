//! How long a run is, and what happens when.

use ferrotune_core::Result;
use ferrotune_core::config::{IntervalStrategy, TrainConfig};
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::trainer::RunPlan;

pub(super) fn run_plan(
    config: &TrainConfig,
    steps_per_epoch: u64,
    trainable: usize,
    decoder: &DecoderConfig,
) -> Result<RunPlan> {
    let total_steps = config.schedule.total_steps(steps_per_epoch);
    let output = &config.output;
    let every = |strategy: IntervalStrategy, steps: u64| match strategy {
        IntervalStrategy::No => None,
        IntervalStrategy::Steps => Some(steps),
        IntervalStrategy::Epoch => Some(steps_per_epoch),
    };
    // Forward and the activations' gradient take 2 FLOPs per weight each, a trained weight 2 more.
    let base = decoder.parameters() as f64;
    let flops_per_token = if config.lora.use_peft {
        4.0 * base + 6.0 * trainable as f64
    } else {
        6.0 * base
    };
    Ok(RunPlan {
        total_steps,
        steps_per_epoch,
        log_every: every(
            output.logging_strategy,
            output.logging_interval(total_steps),
        ),
        log_first: output.logging_first_step,
        save_every: every(output.save_strategy, output.save_interval(total_steps)),
        eval_every: every(output.eval_strategy, output.eval_interval(total_steps)),
        save_best: output.load_best_model_at_end,
        can_end_early: output.early_stopping_patience.is_some(),
        check_replicas_every: Some(config.runtime.replica_check_steps).filter(|steps| *steps > 0),
        flops_per_token,
    })
}
