//! Going on where a run stopped, to the same bits.

use super::Recipe;
use super::outputs::{self, ALGORITHMS, CheckpointFiles, DATA_DIGEST, RUN_STATE, STATE};
use ferrotune_core::checkpoint::{
    self, Checkpoint, MANIFEST, OPTIMIZER, RunIdentity, read_optimizer,
};
use ferrotune_core::config::{Resume, TrainConfig};
use ferrotune_core::io::{holds_set_aside, remove_stale};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::run_log::{LogWindow, TrainerState};
use ferrotune_core::trainer::Trainer;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::cuda::GemmRecord;
use serde_json::Value;
use std::path::Path;

/// Keys that may differ between a run and its continuation. What the paths of base, data and template
/// point at is compared by digest, so that it may lie elsewhere. Of the others only `max_steps` and
/// `num_train_epochs` can change what is trained, through a schedule that depends on the run's
/// length: to make a run longer is a choice.
///
/// `gradient_accumulation_steps` times the number of ranks is compared instead of either.
const FREE_KEYS: [&str; 40] = [
    "activation_offloading",
    "chat_template_path",
    "cuda_graph",
    "dataset_cache_dir",
    "dataset_name",
    "dataset_test_split",
    "dataset_train_split",
    "ddp_backend",
    "ddp_timeout",
    "device",
    "early_stopping_patience",
    "early_stopping_threshold",
    "eval_file",
    "eval_packing",
    "eval_steps",
    "eval_strategy",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "load_best_model_at_end",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "max_steps",
    "model_name_or_path",
    "model_revision",
    "num_threads",
    "num_train_epochs",
    "output_dir",
    "overwrite_output_dir",
    "peer_timeout",
    "per_device_eval_batch_size",
    "rendezvous_timeout",
    "replica_check_steps",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "train_file",
];

/// Refuses, before any data are read, a checkpoint that the run cannot go on from as far as that
/// shows: one that is not there, not whole by its lengths, or of another base or configuration.
///
/// Every byte is checked by [`find`], when the run has its output directory to itself.
///
/// # Errors
/// [`Error::Config`] or [`Error::Checkpoint`].
pub(super) fn check_early(config: &TrainConfig, now: &RunIdentity) -> Result<()> {
    let output = Path::new(&config.output.output_dir);
    match &config.output.resume_from_checkpoint {
        Resume::Never | Resume::Auto => Ok(()),
        // A checkpoint that a killed run was replacing comes back when the run starts.
        _ if holds_set_aside(output) => Ok(()),
        Resume::Last if checkpoint::list(output)?.is_empty() => Err(none_to_go_on_from(output)),
        Resume::Last => Ok(()),
        Resume::From(path) => {
            if !path.join(MANIFEST).exists() {
                require_a_checkpoint(path)?;
            }
            let then = Checkpoint::glance(path)?.run;
            let mut now = now.clone();
            let data = then.fingerprints.get_key_value(DATA_DIGEST);
            now.fingerprints
                .extend(data.map(|(name, digest)| (name.clone(), digest.clone())));
            refuse_another_run(path, &then, &now)
        }
    }
}

/// Says what stands at a path that was given for a checkpoint and is none, where that helps more
/// than the name of a missing file.
fn require_a_checkpoint(path: &Path) -> Result<()> {
    let fault = |message: String| {
        let message = format!("`{}` {message}", path.display());
        Err(Error::config("resume_from_checkpoint", message))
    };
    let beside = path.parent().map(checkpoint::list);
    if !path.exists() {
        let beside = beside.transpose().unwrap_or_default().unwrap_or_default();
        return fault(match beside.last() {
            Some((_, newest)) => {
                format!("does not exist; the newest there is {}", newest.display())
            }
            None => "does not exist; expected the path of a checkpoint, auto, or null".into(),
        });
    }
    if !path.is_dir() {
        return fault("is a file; expected the directory of a checkpoint".into());
    }
    match checkpoint::list(path)?.last() {
        Some((_, newest)) => fault(format!(
            "holds checkpoints and is none; give one of them, such as {}",
            newest.display()
        )),
        None => Ok(()),
    }
}

fn none_to_go_on_from(output: &Path) -> Error {
    let message = format!(
        "true, but `{}` holds no checkpoint; use auto to start anew",
        output.display()
    );
    Error::config("resume_from_checkpoint", message)
}

/// The checkpoint a run starts from, verified, if it is to start from one.
pub(super) fn find(recipe: &Recipe, output: &Path) -> Result<Option<Checkpoint>> {
    remove_stale(output)?;
    let found = match &recipe.config.output.resume_from_checkpoint {
        Resume::Never => None,
        Resume::From(path) => Some(Checkpoint::verify(path)?),
        Resume::Auto => newest(output)?,
        Resume::Last => match newest(output)? {
            None => return Err(none_to_go_on_from(output)),
            found => found,
        },
    };
    if let Some(checkpoint) = &found {
        let now = CheckpointFiles::new(recipe).identity();
        refuse_another_run(checkpoint.path(), &checkpoint.manifest().run, &now)?;
    }
    Ok(found)
}

fn newest(output: &Path) -> Result<Option<Checkpoint>> {
    let Some((checkpoint, skipped)) = checkpoint::latest_valid(output)? else {
        return Ok(None);
    };
    for reason in skipped {
        tracing::warn!("passed over a damaged checkpoint: {reason}");
    }
    Ok(Some(checkpoint))
}

fn refuse_another_run(checkpoint: &Path, then: &RunIdentity, now: &RunIdentity) -> Result<()> {
    let differences: Vec<String> = with_defaults(then)
        .differences(now)
        .into_iter()
        .filter(|line| !FREE_KEYS.iter().any(|key| names_key(line, key)))
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::config(
        "resume_from_checkpoint",
        format!(
            "{} belongs to another run:\n  {}\nset these back, or start a new run in another output_dir",
            checkpoint.display(),
            differences.join("\n  ")
        ),
    ))
}

/// `then` with the defaults of keys that an older version did not have.
fn with_defaults(then: &RunIdentity) -> RunIdentity {
    let mut then = then.clone();
    if let (Value::Object(keys), Value::Object(defaults)) =
        (&mut then.config, TrainConfig::default().to_json())
    {
        for (key, default) in defaults {
            keys.entry(key).or_insert(default);
        }
    }
    then
}

/// Whether a line of differences is about `key`.
fn names_key(line: &str, key: &str) -> bool {
    let bare = line
        .trim_start_matches("config")
        .trim_start_matches(['.', ' ', '`']);
    bare.strip_prefix(key)
        .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
}

/// Puts a checkpoint into a fresh trainer; returns the log so far.
pub(super) fn restore(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    trainer: &mut Trainer,
) -> Result<(TrainerState, LogWindow)> {
    let directory = checkpoint.path();
    let layout = std::sync::Arc::clone(trainer.params().layout());
    let mut params = FlatBuffer::zeros(&layout);
    trainer.adapter().load(&mut params, directory)?;
    let (step, state) = read_optimizer(&directory.join(OPTIMIZER), &trainer.state())?;
    if step != checkpoint.step() {
        let message = format!(
            "is of step {step}, the checkpoint of step {}",
            checkpoint.step()
        );
        return Err(Error::checkpoint(directory.join(OPTIMIZER), message));
    }
    trainer.restore(step, &params, &state);
    replay_algorithms(&directory.join(ALGORITHMS), trainer)?;
    let read = |name: &str| {
        let path = directory.join(name);
        std::fs::read_to_string(&path)
            .map_err(Error::read(&path))
            .map(|text| (text, path))
    };
    let (text, path) = read(STATE)?;
    let state = TrainerState::from_json(&text, &path)?;
    let state = state.with_selection(recipe.config.output.selection());
    let (text, path) = read(RUN_STATE)?;
    let window = LogWindow::from_json(&text, &path)?;
    Ok((state, window))
}

/// Gives the trainer the weights of the best evaluation, for the result.
///
/// # Errors
/// [`Error::Checkpoint`] if the checkpoint made then is not whole any more.
pub(super) fn go_back_to_best(
    recipe: &Recipe,
    output: &Path,
    state: &TrainerState,
    trainer: &mut Trainer,
) -> Result<()> {
    let metric = recipe.config.output.selection().metric;
    let Some((step, best)) = state.best() else {
        tracing::warn!(
            "no evaluation had a number as eval_{metric}, so the result is the last step's"
        );
        return Ok(());
    };
    if step != trainer.steps_done() {
        let checkpoint = Checkpoint::verify(&checkpoint::path_of(output, step))?;
        trainer.load_adapter(checkpoint.path())?;
    }
    tracing::info!("the result is that of step {step}, whose eval_{metric} of {best} is the best");
    Ok(())
}

/// Uses the algorithms of the run so far, as far as this GPU and its library are those.
fn replay_algorithms(path: &Path, trainer: &Trainer) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let text = std::fs::read(path).map_err(Error::read(path))?;
    let records: Vec<GemmRecord> = serde_json::from_slice(&text)
        .map_err(|e| Error::checkpoint(path, format!("is no list of algorithms: {e}")))?;
    let used = trainer.replay_algorithms(&records)?;
    if used < records.len() {
        tracing::warn!(
            "{}: {} of {} algorithms are of another GPU or another version of its library and are chosen anew; \
             the continued run differs in its last bits",
            path.display(),
            records.len() - used,
            records.len()
        );
    }
    Ok(())
}

/// Refuses a checkpoint at or after the last step where `output` holds what came later: nothing would
/// be trained, and the later result would be replaced by the earlier one.
///
/// # Errors
/// [`Error::Config`], nothing changed.
pub(super) fn refuse_to_go_back(output: &Path, step: u64, total_steps: u64) -> Result<()> {
    let newest = checkpoint::list(output)?.into_iter().map(|(s, _)| s);
    let later = newest.chain(outputs::result_step(output)).max();
    match later {
        Some(later) if step >= total_steps && later > step => Err(Error::config(
            "resume_from_checkpoint",
            format!(
                "the checkpoint of step {step} leaves nothing to train up to step {total_steps}, and {} holds \
                 what came later, up to step {later}; raise max_steps or num_train_epochs, or write to another \
                 output_dir",
                output.display()
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_key_is_not_mistaken_for_a_longer_one() {
        assert!(names_key(
            "config.save_steps: 1 before, 2 now",
            "save_steps"
        ));
        assert!(names_key("`save_steps`: 1 before, 2 now", "save_steps"));
        assert!(!names_key("config.save_steps_extra: 1", "save_steps"));
        assert!(!names_key("config.learning_rate: 1", "save_steps"));
    }

    #[test]
    fn a_key_that_an_older_version_did_not_have_is_at_its_default() {
        let now = |overrides: Value| {
            let mut config = TrainConfig::default().to_json();
            for (key, value) in overrides.as_object().into_iter().flatten() {
                config[key] = value.clone();
            }
            RunIdentity {
                config,
                ..RunIdentity::default()
            }
        };
        let mut then = now(json!({"seed": 3}));
        let keys = then.config.as_object_mut().expect("an object");
        assert!(keys.remove("optim_args").is_some());
        let refused = |now| refuse_another_run(Path::new("checkpoint-1"), &then, &now);
        assert!(refused(now(json!({"seed": 3}))).is_ok());
        assert!(refused(now(json!({"seed": 4}))).is_err());
        let other = json!({"seed": 3, "optim_args": {"momentum": 0.9}});
        assert!(refused(now(other)).is_err());
    }
}
