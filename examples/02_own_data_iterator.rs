//! Rows that come from your own code: a database, a queue, or a generator as here.
//!
//! Every run feature stays (packing, checkpoints, resumption, logs), because only the source of
//! the rows is yours. Errors name the row: `data: sums:17: ...`.
//!
//! `cargo run --release --example 02_own_data_iterator`

use ferrotune::core::run_log::{Event, Observer};
use ferrotune::prelude::*;
use std::sync::atomic::AtomicBool;

/// Sums of two digits, one after the other.
struct Sums {
    next: u32,
}

impl Iterator for Sums {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        let (a, b) = (self.next / 10, self.next % 10);
        self.next += 1;
        (a < 10).then(|| Record::PromptCompletion {
            prompt: format!("{a} + {b} ="),
            completion: format!(" {}", a + b),
        })
    }
}

/// Hears of everything that happens in a run; here it prints the loss.
struct PrintLoss;

impl Observer for PrintLoss {
    fn on(&mut self, event: &Event) -> Result<()> {
        if let Event::StepLogged(row) = event {
            println!("step {:>3}  loss {:.3}", row.step, row.loss);
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let mut config = TrainConfig::default();
    config.model.model_name_or_path = Some("examples/demo/base".into());
    config.lora.use_peft = true;
    config.optimizer.learning_rate = 5e-3;
    config.schedule.max_steps = 60;
    config.output.output_dir = "out/own_data_iterator".into();
    config.output.overwrite_output_dir = true;

    let recipe = Recipe::prepare_with_rows(config, "sums", Sums { next: 0 })?;
    println!("{} rows", recipe.dataset.examples.len());
    recipe.train(&mut [Box::new(PrintLoss)], &AtomicBool::new(false))?;
    Ok(())
}
