//! What a run will do, before it does it: `plan` and `--dry-run`.

use super::memory::{self, Base};
use super::{LeastTime, Recipe, adapter, matched};
use ferrotune_core::Result;
use ferrotune_core::model::{ActivationPlan, Keep};
use serde_json::{Value, json};
use std::fmt;

/// Facts about a prepared run.
#[derive(Debug)]
pub struct Summary {
    lines: Vec<(&'static str, String)>,
    json: Value,
}

impl Summary {
    /// Collects them.
    ///
    /// # Errors
    /// [`ferrotune_core::Error::Config`] if the adapter's settings contradict each other.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        let (config, plan, report) = (&recipe.config, &recipe.plan, &recipe.dataset.report);
        let parameters = recipe.total_parameters();
        let share = 100.0 * recipe.trainable as f64 / parameters as f64;
        let attached = adapter::attach(&recipe.config, &recipe.base, &recipe.decoder)?;
        let [weights, trained] = Base::of(recipe).fixed_bytes(&recipe.config, &attached);
        let activations = &recipe.activations;
        let step = activations.bytes;
        let state = memory::state_bytes(&config.optimizer.choice()?, &attached.layout);
        // Values are f32.
        let checkpoint = recipe.trainable as u64 * 4 + attached.saved_frozen + state;
        let method = recipe.adapter()?.describe();
        let modules = matched::table(&attached);
        let mut lines = vec![
            ("model", model(recipe)),
            (
                "method",
                format!("{method}: {} trainable ({share:.2} %)", recipe.trainable),
            ),
            (
                "data",
                format!(
                    "{} rows, {} dropped, {} truncated; {} tokens, {} trained; longest {}",
                    report.rows,
                    report.dropped_rows,
                    report.truncated_rows,
                    report.tokens,
                    report.trained_tokens,
                    report.longest
                ),
            ),
            ("batch", batch(recipe)),
            (
                "steps",
                format!("{} ({} per epoch)", plan.total_steps, plan.steps_per_epoch),
            ),
            (
                "memory",
                format!(
                    "about {} of {} available = weights {} + trained {} + kept activations {} + working buffers \
                     {} + loss {} + other {}",
                    mib(weights + trained + step.total()),
                    mib(recipe.available_memory),
                    mib(weights),
                    mib(trained),
                    mib(step.kept),
                    mib(step.working),
                    mib(step.loss),
                    mib(step.other)
                ),
            ),
            ("layers", layers(activations)),
            ("compute", compute(recipe)),
            ("checkpoint", checkpoints(recipe, checkpoint)),
            ("output", config.output.output_dir.clone()),
        ];
        let of_modules = matched::lines(&modules).into_iter();
        let labels = std::iter::once("modules").chain(std::iter::repeat(""));
        lines.splice(2..2, labels.zip(of_modules));
        let json = json!({
            "model": recipe.base.display().to_string(),
            "method": method,
            "parameters": parameters,
            "trainable_parameters": recipe.trainable,
            "modules": matched::to_json(&modules),
            "rows": report.rows,
            "dropped_rows": report.dropped_rows,
            "truncated_rows": report.truncated_rows,
            "tokens": report.tokens,
            "trained_tokens": report.trained_tokens,
            "max_tokens": recipe.max_tokens,
            "world_size": recipe.place.world_size,
            "total_steps": plan.total_steps,
            "steps_per_epoch": plan.steps_per_epoch,
            "memory_bytes": {
                "weights": weights,
                "trained": trained,
                "activations": step.kept,
                "working": step.working,
                "loss": step.loss,
                "other": step.other,
                "host_activations": activations.host,
            },
            "available_memory_bytes": recipe.available_memory,
            "activation_plan": {
                "layers": activations.keep.iter().map(|keep| keep.as_str()).collect::<Vec<_>>(),
                "extra_compute": activations.extra_compute,
                "waiting": activations.waiting,
                "offloaded_layers": activations.offloaded,
            },
            "checkpoint_bytes": checkpoint,
            "flops": flops(recipe),
            "output_dir": config.output.output_dir,
            "notes": config.notes,
        });
        Ok(Self { lines, json })
    }

    /// The same with how long the run takes at least.
    #[must_use]
    pub fn with_time(mut self, least: &LeastTime) -> Self {
        let line = format!(
            "at least {} for all steps: {:.2e} FLOPs of products at {:.1} GFLOP/s, measured on this device by one \
             of {}",
            duration(least.seconds()),
            least.flops(),
            least.rate() / 1e9,
            least.product()
        );
        let behind = self.lines.iter().position(|(name, _)| *name == "compute");
        let at = behind.map_or(self.lines.len(), |at| at + 1);
        self.lines.insert(at, ("time", line));
        self.json["least_time"] = json!({
            "seconds": least.seconds(),
            "flops": least.flops(),
            "flops_per_second": least.rate(),
            "product": least.product(),
        });
        self
    }

    /// The same for machines.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.json
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.lines {
            writeln!(f, "{name:>10}  {value}")?;
        }
        Ok(())
    }
}

/// Rows of a step, and the tokens of its largest micro-batch.
fn batch(recipe: &Recipe) -> String {
    let config = &recipe.config;
    let ranks = match recipe.place.world_size {
        1 => String::new(),
        ranks => format!(" on each of {ranks} ranks"),
    };
    format!(
        "{} x {} rows per step{ranks}, {} tokens in the largest micro-batch",
        config.data.per_device_train_batch_size,
        config.optimizer.gradient_accumulation_steps,
        recipe.max_tokens
    )
}

/// The base, and how its linears are held where not as values.
fn model(recipe: &Recipe) -> String {
    let held = Base::of(recipe).held_as(&recipe.weights);
    let held = held.map_or_else(String::new, |name| format!(", linears in {name}"));
    format!(
        "{} ({}, {} parameters{held})",
        recipe.base.display(),
        recipe.decoder.model_type,
        recipe.decoder.parameters()
    )
}

/// Tokens of the run, the last ones of an epoch that is not finished estimated.
fn run_tokens(recipe: &Recipe) -> f64 {
    recipe.dataset.report.tokens as f64 * recipe.plan.epochs()
}

fn flops(recipe: &Recipe) -> f64 {
    run_tokens(recipe) * recipe.plan.flops_per_token
}

/// What there is to compute.
fn compute(recipe: &Recipe) -> String {
    format!(
        "{:.2e} FLOPs for {:.0} tokens",
        flops(recipe),
        run_tokens(recipe)
    )
}

/// Checkpoints, and what they take at most.
fn checkpoints(recipe: &Recipe, bytes: u64) -> String {
    let plan = &recipe.plan;
    let saved = plan
        .save_every
        .map_or(0, |steps| plan.total_steps / steps.max(1));
    let limit = recipe.config.output.save_total_limit;
    let kept = limit.map_or(saved, |limit| saved.min(limit as u64));
    let all = mib(bytes.saturating_mul(kept));
    format!(
        "{} each, {saved} by interval, {kept} kept: about {all}",
        mib(bytes)
    )
}

/// What each layer keeps, and what that costs.
fn layers(plan: &ActivationPlan) -> String {
    let runs: Vec<String> = Keep::runs(&plan.keep)
        .into_iter()
        .map(|(layers, keep)| {
            let what = match keep {
                Keep::All => "keep everything",
                Keep::DropGateUp => "compute gate and up again",
                Keep::Input => "keep their input and compute the rest again",
            };
            format!("{} to {} {what}", layers.start, layers.end - 1)
        })
        .collect();
    let again = 100.0 * plan.extra_compute;
    let moved = match plan.host {
        0 => String::new(),
        bytes => format!(
            "; what the first {} keep is moved to host memory, {}, and waited for about {:.1} % of a step, by a guess of \
             the link's speed",
            plan.offloaded,
            mib(bytes),
            100.0 * plan.waiting
        ),
    };
    format!("{}; {again:.1} % more to compute{moved}", runs.join(", "))
}

/// Seconds, to a tenth below a minute, else as hours, minutes and seconds.
fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds as u64;
    let [hours, minutes] = [whole / 3600, whole / 60 % 60];
    format!("{hours} h {minutes:02} min {:02} s", whole % 60)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
