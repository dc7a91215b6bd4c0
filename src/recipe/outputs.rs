//! What a run leaves behind: checkpoints while it goes, the result at its end.

use super::Recipe;
use ferrotune_core::checkpoint::{
    self, BaseRecord, Checkpoint, OPTIMIZER, RunIdentity, data_digest, write_optimizer,
};
use ferrotune_core::config::TrainConfig;
use ferrotune_core::data::Dataset;
use ferrotune_core::io::{blake3_of_bytes, write_file};
use ferrotune_core::model_card::{Artifact, ModelCard, PromptStyle};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::run_log::{
    CheckpointSaved, Event, LogWindow, Observer, RunFinished, TrainerLogJsonl, TrainerState,
    all_results, eval_results, rows_up_to, train_results,
};
use ferrotune_core::trainer::Trainer;
use ferrotune_core::{Error, Result};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Hugging Face's record of progress and log history.
pub(super) const STATE: &str = "trainer_state.json";
/// Ours beside it: metrics since the last log row, exactly.
pub(super) const RUN_STATE: &str = "run_state.json";

/// Ours too, of a run on a GPU: which algorithm computes which product.
pub(super) const ALGORITHMS: &str = "gemm_algorithms.json";

/// Writes checkpoints of one run.
pub struct CheckpointFiles<'a> {
    recipe: &'a Recipe,
    identity: RunIdentity,
}

impl<'a> CheckpointFiles<'a> {
    /// For checkpoints that belong to `recipe`.
    #[must_use]
    pub fn new(recipe: &'a Recipe) -> Self {
        Self {
            recipe,
            identity: RunIdentity {
                config: recipe.config.to_json(),
                fingerprints: recipe.fingerprints.clone(),
            },
        }
    }

    /// Configuration and fingerprints.
    #[must_use]
    pub fn identity(self) -> RunIdentity {
        self.identity
    }

    /// Writes `output/checkpoint-N` as a whole and returns its path.
    ///
    /// # Errors
    /// [`Error::Write`], or the first failure of the GPU; nothing of the checkpoint is left then.
    pub fn write(
        &self,
        output: &Path,
        trainer: &Trainer,
        state: &TrainerState,
        window: &LogWindow,
    ) -> Result<PathBuf> {
        let step = trainer.steps_done();
        // The state in a checkpoint knows that checkpoint already: it may be the best there is.
        let mut state = state.clone();
        let path = checkpoint::path_of(output, step);
        state.on(&Event::CheckpointSaved(CheckpointSaved { step, path }))?;
        Checkpoint::write(output, step, &self.identity, |directory| {
            write_trained(self.recipe, directory, trainer)?;
            write_optimizer(&directory.join(OPTIMIZER), &trainer.state(), step)?;
            write_file(&directory.join(STATE), state.to_json().as_bytes())?;
            write_algorithms(directory, trainer)?;
            write_file(&directory.join(RUN_STATE), window.to_json().as_bytes())?;
            // What could not be read from a GPU is in the files as NaN.
            trainer.check_device()
        })
    }
}

/// The algorithms of a GPU, whose choice may have been a matter of timing.
fn write_algorithms(directory: &Path, trainer: &Trainer) -> Result<()> {
    let records = trainer.algorithms();
    if records.is_empty() {
        return Ok(());
    }
    let text = format!("{:#}\n", json!(records));
    write_file(&directory.join(ALGORITHMS), text.as_bytes())
}

/// Names of the digests that a continued run must share.
const BASE_DIGEST: &str = "base_model";
pub(super) const DATA_DIGEST: &str = "data";
/// Micro-batches of an optimizer step: gradient_accumulation_steps times ranks.
const MICRO_BATCHES: &str = "micro_batches_per_step";

/// Digests of base and data: equal for a continued run to be the same run.
pub(super) fn fingerprints(
    identity: RunIdentity,
    dataset: &Dataset,
) -> Result<BTreeMap<String, String>> {
    let mut fingerprints = identity.fingerprints;
    fingerprints.insert(DATA_DIGEST.into(), data_digest(&dataset.examples)?);
    Ok(fingerprints)
}

/// What a run is as far as it is known before its data are.
///
/// The number of ranks may change where the micro-batches of a step stay as many.
pub(super) fn identity_without_data(
    config: &TrainConfig,
    base: &str,
    world_size: usize,
) -> RunIdentity {
    let accumulation = config.optimizer.gradient_accumulation_steps;
    RunIdentity {
        config: config.to_json(),
        fingerprints: BTreeMap::from([
            (BASE_DIGEST.into(), base.into()),
            (
                MICRO_BATCHES.into(),
                accumulation.saturating_mul(world_size).to_string(),
            ),
        ]),
    }
}

/// Digest of the base: its configuration and its weights.
///
/// # Errors
/// [`Error::Read`].
pub(super) fn base_digest(base: &Path, weights: Option<&BaseRecord>) -> Result<String> {
    let path = base.join("config.json");
    let config = match std::fs::read(&path) {
        // A GGUF file has its configuration in itself.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && weights.is_some() => Vec::new(),
        config => config.map_err(Error::read(&path))?,
    };
    let config = blake3_of_bytes(&config);
    Ok(match weights {
        Some(weights) => blake3_of_bytes(format!("{config}{}", weights.blake3).as_bytes()),
        None => config,
    })
}

/// The trained weights with what is needed to load them.
fn write_trained(recipe: &Recipe, directory: &Path, trainer: &Trainer) -> Result<()> {
    refuse_not_finite(trainer)?;
    trainer.adapter().save(trainer.params(), directory)?;
    for file in recipe.tokenizer.files() {
        copy(file, directory)?;
    }
    if recipe.config.lora.use_peft {
        BaseRecord::write(recipe.base_weights.as_ref(), directory)?;
    } else {
        write_model_config(recipe, directory)?;
        let generation = recipe.base.join("generation_config.json");
        if generation.is_file() {
            copy(&generation, directory)?;
        }
    }
    Ok(())
}

/// An update can overflow though loss and gradient were finite; what it made is not worth a file.
fn refuse_not_finite(trainer: &Trainer) -> Result<()> {
    let params = trainer.params();
    let segments = params.layout().by_name();
    let finite = |values: &[f32]| values.iter().all(|v| v.is_finite());
    let broken = segments
        .into_iter()
        .find(|(id, _)| !finite(params.get(*id)));
    trainer.check_device()?;
    let Some((_, segment)) = broken else {
        return Ok(());
    };
    let message = format!(
        "`{}` is not finite after step {}, so it is not saved; lower learning_rate or set \
         max_grad_norm. Checkpoints from before are whole",
        segment.spec.name,
        trainer.steps_done()
    );
    Err(Error::Numeric { message })
}

/// The base's config with the dtype that the trained weights have.
fn write_model_config(recipe: &Recipe, directory: &Path) -> Result<()> {
    let path = recipe.base.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(Error::read(&path))?;
    let mut config: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Error::model(&path, format!("is not valid JSON: {e}")))?;
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = config.get_mut(key) {
            *value = json!("float32");
        }
    }
    write_file(
        &directory.join("config.json"),
        format!("{config:#}\n").as_bytes(),
    )
}

fn copy(file: &Path, directory: &Path) -> Result<()> {
    let bytes = std::fs::read(file).map_err(Error::read(file))?;
    match file.file_name() {
        Some(name) => write_file(&directory.join(name), &bytes),
        None => Ok(()),
    }
}

/// `trainer_log.jsonl`, opened: continued where the checkpoint was taken, or begun anew.
pub(super) fn trainer_log(
    output: &Path,
    from: Option<&Checkpoint>,
) -> Result<TrainerLogJsonl<File>> {
    let path = output.join("trainer_log.jsonl");
    let kept = match from {
        Some(checkpoint) => rows_up_to(
            &std::fs::read_to_string(&path).unwrap_or_default(),
            checkpoint.step(),
        ),
        None => String::new(),
    };
    // In place of whatever is there, a link too; a process killed here has lost no row.
    write_file(&path, kept.as_bytes())?;
    let file = File::options().append(true).open(&path);
    let file = file.map_err(Error::write(&path))?;
    Ok(TrainerLogJsonl::new(file, path))
}

/// Written last: where it is, the whole result is.
const RUN: &str = "run.json";

/// Written if the run evaluates.
const EVALUATION: &str = "eval_results.json";

/// Whether `output` holds the whole result of a run of `step` steps.
pub(super) fn has_result(output: &Path, step: u64) -> bool {
    result_step(output) == Some(step)
}

/// Steps of the run whose result `output` holds.
pub(super) fn result_step(output: &Path) -> Option<u64> {
    let text = std::fs::read(output.join(RUN)).unwrap_or_default();
    let run: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    run["steps"].as_u64()
}

/// Takes back the claim that `output` holds a result: a run is about to make another, which may have no
/// evaluation.
pub(super) fn withdraw_result(output: &Path) -> Result<()> {
    for name in [RUN, EVALUATION] {
        let path = output.join(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::write(&path)(e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The result, at the top of the output directory, read back before it counts.
pub(super) fn write_final(
    recipe: &Recipe,
    output: &Path,
    trainer: &Trainer,
    state: &TrainerState,
    finished: &RunFinished,
) -> Result<()> {
    let best = state.best_step();
    let of_best = best.filter(|_| recipe.config.output.load_best_model_at_end);
    let evaluated = state.evaluation(of_best.unwrap_or(trainer.steps_done()));
    write_trained(recipe, output, trainer)?;
    verify(output, trainer)?;
    write_file(&output.join(STATE), state.to_json().as_bytes())?;
    write_file(
        &output.join("train_results.json"),
        train_results(finished).as_bytes(),
    )?;
    write_file(
        &output.join("all_results.json"),
        all_results(finished, evaluated.as_ref()).as_bytes(),
    )?;
    if let Some(evaluated) = &evaluated {
        write_file(&output.join(EVALUATION), eval_results(evaluated).as_bytes())?;
    }
    write_file(
        &output.join("README.md"),
        model_card(recipe, finished).render().as_bytes(),
    )?;
    write_file(&output.join(RUN), run_json(recipe, finished).as_bytes())
}

/// Re-reads what was saved: every tensor, bit for bit.
fn verify(directory: &Path, trainer: &Trainer) -> Result<()> {
    let params = trainer.params();
    let mut read = FlatBuffer::zeros(params.layout());
    trainer.adapter().load(&mut read, directory)?;
    let same = read
        .as_slice()
        .iter()
        .zip(params.as_slice())
        .all(|(a, b)| a.to_bits() == b.to_bits());
    if same {
        return Ok(());
    }
    let source = std::io::Error::other(
        "what was read back differs from what was written; the disk or memory is failing",
    );
    Err(Error::write(directory)(source))
}

fn model_card(recipe: &Recipe, finished: &RunFinished) -> ModelCard {
    let config = &recipe.config;
    let adapter = config.lora.use_peft;
    let data = &config.data;
    let datasets = data
        .dataset_name
        .iter()
        .chain(&data.train_file)
        .cloned()
        .collect();
    let number = |value: f64| format!("{value:.4}");
    let output = Path::new(&config.output.output_dir);
    let name = output
        .file_name()
        .map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    ModelCard {
        artifact: if adapter {
            Artifact::Adapter
        } else {
            Artifact::Model
        },
        name,
        base_model: config.model.model_name_or_path.clone().unwrap_or_default(),
        location: config.output.output_dir.clone(),
        datasets,
        tags: Vec::new(),
        prompt_style: match (
            recipe.decoder.classifier,
            recipe.tokenizer.chat_template(None),
        ) {
            (Some(classifier), _) => PromptStyle::Classes(classifier.classes),
            (None, Some(_)) => PromptStyle::Chat,
            (None, None) => PromptStyle::Text,
        },
        facts: vec![
            (
                "Method".into(),
                recipe.adapter().map(|a| a.describe()).unwrap_or_default(),
            ),
            ("Trainable parameters".into(), recipe.trainable.to_string()),
            ("Examples".into(), recipe.dataset.examples.len().to_string()),
            ("Optimizer steps".into(), finished.step.to_string()),
            ("Epochs".into(), number(finished.epoch)),
            (
                "Learning rate".into(),
                format!("{:e}", config.optimizer.learning_rate),
            ),
            ("Schedule".into(), config.schedule.lr_scheduler_type.clone()),
            ("Mean training loss".into(), number(finished.train_loss)),
            ("Seed".into(), config.runtime.seed.to_string()),
        ],
        version: env!("CARGO_PKG_VERSION").into(),
    }
}

/// What ran: versions, digests, counts.
fn run_json(recipe: &Recipe, finished: &RunFinished) -> String {
    let report = &recipe.dataset.report;
    let document = json!({
        "ferrotune_version": env!("CARGO_PKG_VERSION"),
        "world_size": recipe.place.world_size,
        "digests": recipe.fingerprints,
        "config": recipe.config.to_json(),
        "data": {
            "rows": report.rows,
            "dropped_rows": report.dropped_rows,
            "truncated_rows": report.truncated_rows,
            "tokens": report.tokens,
            "trained_tokens": report.trained_tokens,
        },
        "steps": finished.step,
        "seconds": finished.train_runtime,
    });
    format!("{document:#}\n")
}
