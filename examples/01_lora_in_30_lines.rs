//! A whole LoRA run: config, data, training, checkpoints, model card, adapter.
//!
//! `cargo run --release --example 01_lora_in_30_lines`

use ferrotune::prelude::*;
use std::sync::atomic::AtomicBool;

fn main() -> Result<()> {
    let mut config = TrainConfig::default();
    config.model.model_name_or_path = Some("examples/demo/base".into());
    config.data.train_file = vec!["examples/opposites.jsonl".into()];
    config.lora.use_peft = true;
    config.lora.lora_r = 16;
    config.lora.lora_target_modules = Some(Names::Pattern("all-linear".into()));
    config.optimizer.learning_rate = 5e-3;
    config.schedule.max_steps = 40;
    config.output.output_dir = "out/lora_in_30_lines".into();
    config.output.overwrite_output_dir = true;

    // Everything is checked here, before a weight is read.
    let recipe = Recipe::prepare(config)?;
    print!("{}", Summary::of(&recipe)?);

    if let RunOutcome::Finished(run) = recipe.train(&mut [], &AtomicBool::new(false))? {
        println!("{} steps, mean loss {:.3}", run.steps, run.train_loss);
        println!("the adapter is in {}", recipe.config.output.output_dir);
    }
    Ok(())
}
