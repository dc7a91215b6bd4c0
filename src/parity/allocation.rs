//! Recorded steps of AdaLoRA: losses, how many singular values are left after each, the final files.

use super::adapted::Adapted;
use super::arch::{FORWARD, GRADIENT};
use super::case::{Case, dtype_of, inputs, read_json};
use super::compare::Comparison;
use ferrotune_core::io::{ModelFiles, SafetensorsFile};
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::process_group::Solo;
use ferrotune_core::trainer::{Trainer, TrainerOptions};
use ferrotune_core::{Error, Result};
use serde_json::Value;

/// What the recorded loop is made of; its learning rate is in the words that name it.
const LOOP: &str = "AdamW(lr=1e-2,wd=0).step()";
const LEARNING_RATE: f64 = 1e-2;

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let says = case.json.get("loop").and_then(Value::as_str).unwrap_or("");
    if !says.contains(LOOP) {
        let path = case.path("case.json");
        let message = format!("`loop` is \"{says}\", expected one with {LOOP}");
        return Err(Error::data(path, None, message));
    }
    let base = case.base()?;
    let padded = inputs(&SafetensorsFile::open(base.join("inputs.safetensors"))?, "")?;
    let (batch, places) = padded.pack();
    let mut comparison = Comparison::default();
    let mut trainer = trainer(case, batch.tokens())?;
    let history = read_json(&case.path("history.json"))?;
    let history = history.as_array().map(Vec::as_slice).unwrap_or_default();
    for row in history {
        let report = trainer.step(std::slice::from_ref(&batch), LEARNING_RATE)?;
        let name = format!("step {}", row["step"]);
        let loss = row["loss"].as_f64().unwrap_or(f64::NAN);
        comparison.number("loss", &name, report.loss(), loss, GRADIENT);
        let ranks = row["ranks"].as_object().into_iter().flatten();
        for (module, theirs) in ranks {
            let ours = singular_values(&trainer, module)?;
            let left = ours.iter().filter(|e| **e != 0.0).count() as f64;
            let theirs = theirs.as_f64().unwrap_or(f64::NAN);
            comparison.number("ranks", &format!("{name} {module}"), left, theirs, 0.0);
        }
    }
    trainer.finish();
    let temporary = tempfile::tempdir().map_err(Error::write(std::env::temp_dir()))?;
    trainer.adapter().save(trainer.params(), temporary.path())?;
    let files = [temporary.path().to_path_buf(), case.path("final_adapter")]
        .map(|directory| SafetensorsFile::open(directory.join("adapter_model.safetensors")));
    let [ours, theirs] = files;
    let (ours, theirs) = (ours?, theirs?);
    for name in theirs.names() {
        let tensor = ours.read_f32(name)?;
        comparison.tensor(
            "final weights",
            name,
            &tensor,
            &theirs.read_f32(name)?,
            GRADIENT,
        );
    }
    // Read back from our own files and from theirs.
    let expected = SafetensorsFile::open(case.path("expected.safetensors"))?;
    let logits = super::arch::select(&expected, "logits", &padded, &places)?;
    for directory in [temporary.path().to_path_buf(), case.path("final_adapter")] {
        let dtype = dtype_of(&ModelFiles::open(&base)?.shards()[0]);
        let adapted = Adapted::load(&base, Some(&directory), dtype, &case.device)?;
        let run = adapted.run(dtype, &batch)?;
        comparison.tensor("logits", "logits", run.logits(), &logits, FORWARD);
    }
    Ok(comparison)
}

fn trainer(case: &Case, max_tokens: usize) -> Result<Trainer> {
    let base = case.base()?;
    let files = ModelFiles::open(&base)?;
    let config = DecoderConfig::open(&base)?;
    let initial = case.path("initial_adapter");
    let read = || ferrotune_lora::load(&initial, &config);
    let options = TrainerOptions {
        device: case.device.clone(),
        max_grad_norm: None,
        max_tokens,
        ..TrainerOptions::default()
    };
    let mut trainer = Trainer::new(&config, &files, read()?, Box::new(Solo), options)?;
    read()?.load(trainer.params_mut(), &initial)?;
    Ok(trainer)
}

fn singular_values<'a>(trainer: &'a Trainer, module: &str) -> Result<&'a [f32]> {
    let name = format!("base_model.model.{module}.lora_E");
    let id = trainer.params().layout().find(&name);
    let id = id.ok_or_else(|| Error::config("ranks", format!("`{module}` is not adapted")))?;
    Ok(trainer.params().get(id))
}
