//! Your own loop over `Trainer::step`: own batches, own schedule, early stopping, own files.
//!
//! `cargo run --release --example 03_own_training_loop`

use ferrotune::core::data::PrepareOptions;
use ferrotune::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

/// Optimizer steps at most.
const STEPS: u64 = 60;
/// Rows of a micro-batch, and micro-batches of a step.
const ROWS: usize = 4;
const ACCUMULATION: usize = 2;
/// Evaluations without a better loss before the loop ends.
const PATIENCE: usize = 2;

fn main() -> Result<()> {
    let base = Path::new("examples/demo/base");
    let tokenizer = Tokenizer::from_dir(base)?;
    let files = ["examples/opposites.jsonl".into()];
    let rows = Dataset::load(&files, &tokenizer, &PrepareOptions::default())?;
    let rows = rows.examples.to_vec()?;
    let (held_out, training) = rows.split_at(4);
    let held_out = [pack(held_out.iter())];

    let mut trainer = trainer(base)?;
    let schedule = LrSchedule::new("cosine", &BTreeMap::new(), 5e-3, 5, STEPS)?;
    let mut endless = training.iter().cycle();
    let (mut best, mut worse) = (f64::INFINITY, 0);
    for step in 0..STEPS {
        // The gradient is that of all trained tokens of the step, however rows are split.
        let micro_batches: Vec<PackedBatch> = (0..ACCUMULATION)
            .map(|_| pack(endless.by_ref().take(ROWS)))
            .collect();
        let report = trainer.step(&micro_batches, schedule.lr(step))?;
        if (step + 1) % 10 != 0 {
            continue;
        }
        let held_out_loss = trainer.evaluate(&held_out)?.loss;
        println!(
            "step {:>2}  loss {:.3}  held out {held_out_loss:.3}  gradient norm {:.2}",
            step + 1,
            report.loss(),
            report.grad_norm
        );
        worse = if held_out_loss < best { 0 } else { worse + 1 };
        best = best.min(held_out_loss);
        if worse == PATIENCE {
            println!("no better for {PATIENCE} evaluations: stopping");
            break;
        }
    }

    let output = Path::new("out/own_training_loop");
    std::fs::create_dir_all(output).map_err(Error::write(output))?;
    trainer.adapter().save(trainer.params(), output)?;
    println!("the adapter is in {}", output.display());
    Ok(())
}

/// A model in training: what it is, where its weights are, what is trained.
fn trainer(base: &Path) -> Result<Trainer> {
    let config = DecoderConfig::open(base)?;
    let lora = LoraConfig {
        rank: 8,
        alpha: 16.0,
        target_modules: Some(TargetModules::AllLinear),
        base_model_name_or_path: Some(base.display().to_string()),
        ..LoraConfig::default()
    };
    let adapter = LoraAdapter::new(lora, &config.model_type)?;
    let options = TrainerOptions {
        weight_decay: 0.01,
        ..TrainerOptions::default()
    };
    let weights = ModelFiles::open(base)?;
    Trainer::new(
        &config,
        &weights,
        Box::new(adapter),
        Box::new(Solo),
        options,
    )
}

/// Documents in one row, without padding; they do not see each other.
fn pack<'a>(documents: impl Iterator<Item = &'a Example>) -> PackedBatch {
    PackedBatch::pack((0..).zip(documents))
}
