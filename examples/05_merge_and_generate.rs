//! From an adapter to answers: with the adapter beside the base, and merged into it.
//!
//! `cargo run --release --example 05_merge_and_generate`

use ferrotune::lora::{MergeDType, MergeOptions, OutputDirectory, merge};
use ferrotune::prelude::*;
use std::path::Path;
use std::sync::atomic::AtomicBool;

fn main() -> Result<()> {
    let base = Path::new("examples/demo/base");
    let adapter = Path::new("out/merge_and_generate/adapter");
    let merged = Path::new("out/merge_and_generate/merged");
    train(base, adapter)?;

    let options = MergeOptions {
        dtype: MergeDType::Float32,
        output: OutputDirectory::Replace,
    };
    let report = merge(base, adapter, merged, &options)?;
    println!(
        "merged {} tensors into {}",
        report.tensors.len(),
        merged.display()
    );

    let questions = ["The opposite of hot is", "The opposite of up is"];
    let beside = answers(&TextModel::load(base, Some(adapter))?, &questions)?;
    let inside = answers(&TextModel::load(merged, None)?, &questions)?;
    for ((question, beside), inside) in questions.iter().zip(&beside).zip(&inside) {
        println!("{question}\n  adapter: {beside}\n  merged:  {inside}");
    }
    Ok(())
}

fn answers(model: &TextModel, questions: &[&str]) -> Result<Vec<String>> {
    // These rows are plain text; `Prompt::user` asks through the chat template.
    let prompts: Vec<Vec<u32>> = questions
        .iter()
        .map(|text| model.encode(&Prompt::Text((*text).to_owned())))
        .collect::<Result<_>>()?;
    let options = GenerateOptions {
        max_new_tokens: 8,
        ..GenerateOptions::default()
    };
    model.answer(&prompts, &options)
}

fn train(base: &Path, output: &Path) -> Result<RunOutcome> {
    let mut config = TrainConfig::default();
    config.model.model_name_or_path = Some(base.display().to_string());
    config.data.train_file = vec!["examples/opposites.jsonl".into()];
    config.lora.use_peft = true;
    config.lora.lora_dropout = 0.0;
    config.lora.lora_target_modules = Some(Names::Pattern("all-linear".into()));
    config.optimizer.learning_rate = 3e-3;
    config.schedule.max_steps = 300;
    config.output.output_dir = output.display().to_string();
    config.output.overwrite_output_dir = true;
    Recipe::prepare(config)?.train(&mut [], &AtomicBool::new(false))
}
