//! Several runs over one base: each is a [`Recipe`] of its own, and every pass over the base is one for all.

use super::memory::{self, Base};
use super::{Recipe, adapter};
use ferrotune_core::config::NamedConfig;
use ferrotune_core::io::write_file;
use ferrotune_core::model::{ActivationPlan, Workload};
use ferrotune_core::process_group::Place;
use ferrotune_core::run_log::{Evaluated, Event, Observer};
use ferrotune_core::trainer::{RunOutcome, Trainer};
use ferrotune_core::{Error, Result};
use serde_json::{Value, json};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

/// What is written of all runs, in the directory that holds theirs.
const REPORT: &str = "adapters.json";

/// Runs that are checked, and have read no weight yet.
#[derive(Debug)]
pub struct Together {
    runs: Vec<(String, Recipe)>,
    activations: ActivationPlan,
}

/// How one of the runs ended.
#[derive(Debug)]
pub struct Ended {
    /// Its name.
    pub name: String,
    /// Where its result is.
    pub output: PathBuf,
    /// How it ended; an error is its own, the others went on.
    pub outcome: Result<RunOutcome>,
    /// Its last evaluation in this process.
    pub evaluated: Option<Evaluated>,
}

impl Together {
    /// Checks each run, and that all of them fit into memory at once.
    ///
    /// # Errors
    /// As [`Recipe::prepare`], naming the adapter; [`Error::Config`] for what one base cannot give to all.
    pub fn prepare(configs: Vec<NamedConfig>) -> Result<Self> {
        let mut runs: Vec<(String, Recipe)> = Vec::with_capacity(configs.len());
        for NamedConfig { name, mut config } in configs {
            // A pass for several moves nothing.
            config.runtime.activation_offloading.get_or_insert(false);
            let of = |error| named(error, &name);
            let mut recipe = Recipe::prepare_at(Place::SOLO, config).map_err(of)?;
            require_shareable(&recipe).map_err(of)?;
            if let Some((_, first)) = runs.first() {
                recipe.device = first.device.clone();
                if recipe.decoder != first.decoder {
                    let message = "another stack of layers than the other adapters have cannot share their base";
                    return Err(of(Error::config("lora_layer_replication", message)));
                }
            }
            runs.push((name, recipe));
        }
        let activations = plan(&mut runs)?;
        Ok(Self { runs, activations })
    }

    /// The runs with their names.
    pub fn runs(&self) -> impl Iterator<Item = (&str, &Recipe)> {
        self.runs
            .iter()
            .map(|(name, recipe)| (name.as_str(), recipe))
    }

    /// What each layer keeps for its backward, and what a step of all takes.
    #[must_use]
    pub fn activations(&self) -> &ActivationPlan {
        &self.activations
    }

    /// Trains all. `observers` makes those of a run by its name, in the thread of that run.
    ///
    /// Writes `adapters.json` beside the directories of the runs.
    ///
    /// # Errors
    /// If the base cannot be read or the report not be written. The error of one run is in what is returned of it.
    pub fn train<'o>(
        &self,
        observers: impl Fn(&str) -> Vec<Box<dyn Observer + 'o>> + Sync,
        stop: &AtomicBool,
    ) -> Result<Vec<Ended>> {
        let Some((_, first)) = self.runs.first() else {
            return Ok(Vec::new());
        };
        let mut adapters = Vec::with_capacity(self.runs.len());
        for (_, recipe) in &self.runs {
            let mut options = recipe.options()?;
            options.keep.clone_from(&self.activations.keep);
            adapters.push((recipe.adapter()?, options));
        }
        let trainers =
            first.with_source(|source| Trainer::together(&first.decoder, source, adapters))?;
        let observers = &observers;
        let ended: Vec<Ended> = std::thread::scope(|scope| {
            let runs = self.runs.iter().zip(trainers);
            let threads: Vec<_> = runs
                .map(|((name, recipe), trainer)| {
                    scope.spawn(move || train_one(name, recipe, trainer, observers(name), stop))
                })
                .collect();
            let ended = threads.into_iter().zip(&self.runs);
            ended
                .map(|(thread, (name, recipe))| {
                    thread.join().unwrap_or_else(|_| broken_off(name, recipe))
                })
                .collect()
        });
        self.write_report(&ended)?;
        Ok(ended)
    }

    fn write_report(&self, ended: &[Ended]) -> Result<()> {
        let Some(directory) = ended.first().and_then(|ended| ended.output.parent()) else {
            return Ok(());
        };
        std::fs::create_dir_all(directory).map_err(Error::write(directory))?;
        let rows = ended.iter().zip(&self.runs);
        let rows: Vec<Value> = rows
            .map(|(ended, (_, recipe))| row(ended, recipe, &self.runs[0].1))
            .collect();
        let text = format!("{:#}\n", json!({ "adapters": rows }));
        write_file(&directory.join(REPORT), text.as_bytes())
    }
}

/// A run's line of the report: how it ended, and the keys in which it is another run than the first.
fn row(ended: &Ended, recipe: &Recipe, first: &Recipe) -> Value {
    let differs = first.config.diff(&recipe.config).into_iter();
    let own = differs.filter(|difference| difference.key != "output_dir");
    let keys: serde_json::Map<String, Value> =
        own.map(|d| (d.key.to_owned(), d.new.clone())).collect();
    let mut row = json!({
        "name": ended.name,
        "output_dir": ended.output,
        "method": recipe.adapter().map(|a| a.describe()).unwrap_or_default(),
        "trainable_parameters": recipe.trainable,
        "keys": keys,
    });
    match &ended.outcome {
        Ok(RunOutcome::Finished(run)) => {
            row["steps"] = json!(run.step);
            row["train_loss"] = json!(run.train_loss);
            row["train_runtime"] = json!(run.train_runtime);
        }
        Ok(RunOutcome::Stopped { step, checkpoint }) => {
            row["stopped_after"] = json!(step);
            row["checkpoint"] = json!(checkpoint);
        }
        Err(error) => row["error"] = json!(error.to_string()),
    }
    if let Some(evaluated) = &ended.evaluated {
        row["eval_loss"] = json!(evaluated.loss);
        row["eval_mean_token_accuracy"] = json!(evaluated.mean_token_accuracy);
    }
    row
}

/// One run, in a thread of its own.
fn train_one(
    name: &str,
    recipe: &Recipe,
    trainer: Trainer,
    mut observers: Vec<Box<dyn Observer + '_>>,
    stop: &AtomicBool,
) -> Ended {
    let last = Last::default();
    observers.push(Box::new(last.clone()));
    let outcome = recipe.lead(&mut observers, stop, |_| Ok(trainer));
    Ended {
        name: name.to_owned(),
        output: output_of(recipe),
        outcome,
        evaluated: last.0.take(),
    }
}

fn broken_off(name: &str, recipe: &Recipe) -> Ended {
    let message = format!("the thread of `{name}` broke off");
    Ended {
        name: name.to_owned(),
        output: output_of(recipe),
        outcome: Err(Error::Numeric { message }),
        evaluated: None,
    }
}

fn output_of(recipe: &Recipe) -> PathBuf {
    Path::new(&recipe.config.output.output_dir).to_path_buf()
}

/// Remembers the last evaluation.
#[derive(Clone, Default)]
struct Last(Rc<Cell<Option<Evaluated>>>);

impl Observer for Last {
    fn on(&mut self, event: &Event) -> Result<()> {
        if let Event::Evaluated(evaluated) = event {
            self.0.set(Some(evaluated.clone()));
        }
        Ok(())
    }
}

/// Refuses what a pass for several cannot do: starts that change the base or need passes of their own over it, and to
/// move what layers keep.
fn require_shareable(recipe: &Recipe) -> Result<()> {
    if recipe.activations.offloaded > 0 {
        let message = "true is for a run of one adapter; leave it out";
        return Err(Error::config("activation_offloading", message));
    }
    let keys = &recipe.config.lora;
    if keys.peft_config.is_some() {
        return Ok(());
    }
    let adapter = adapter::lora(&recipe.config, &recipe.base, &recipe.decoder)?;
    let init = adapter.config().init_lora_weights;
    if !init.changes_base() && !init.needs_data() {
        return Ok(());
    }
    let message = format!(
        "{} starts from the base in a way that other adapters of the run would see; take another start, or train it in \
         a run of its own",
        init.name()
    );
    Err(Error::config("init_lora_weights", message))
}

/// What each layer keeps for its backward when the largest micro-batches of all runs come together: what finds room
/// whichever method all of their tokens have.
fn plan(runs: &mut [(String, Recipe)]) -> Result<ActivationPlan> {
    let workload = all_of(runs.iter().map(|(_, recipe)| &recipe.workload));
    let mut attached = Vec::with_capacity(runs.len());
    for (_, recipe) in runs.iter() {
        let of = adapter::attach(&recipe.config, &recipe.base, &recipe.decoder)?;
        let bytes = Base::of(recipe).method_bytes(&recipe.config, &of);
        attached.push((of, bytes));
    }
    let all = [0, 1].map(|i| attached.iter().map(|(_, bytes)| bytes[i]).sum::<u64>());
    let mut joint: Option<ActivationPlan> = None;
    for ((_, recipe), (attached, bytes)) in runs.iter_mut().zip(attached) {
        let alone = std::mem::replace(&mut recipe.workload, workload.clone());
        let [held, made] = [0, 1].map(|i| all[i] - bytes[i]);
        let available = recipe.available_memory.saturating_sub(held + made);
        let planned = memory::plan(recipe, &attached, available);
        recipe.workload = alone;
        let (mut plan, note) = planned?;
        plan.bytes.working += made;
        if joint.is_none() {
            recipe.config.notes.extend(note);
        }
        joint = Some(joint.map_or(plan.clone(), |joint| least_of(joint, plan)));
    }
    Ok(joint.unwrap_or_default())
}

/// Of two plans the one that takes more, in which each layer keeps what it keeps in both.
fn least_of(one: ActivationPlan, other: ActivationPlan) -> ActivationPlan {
    let keep = one.keep.iter().zip(&other.keep);
    let keep = keep.map(|(one, other)| *one.max(other)).collect();
    let more = match one.bytes.total() >= other.bytes.total() {
        true => one,
        false => other,
    };
    ActivationPlan { keep, ..more }
}

/// The micro-batches of all: the largest of each in one.
fn all_of<'a>(workloads: impl Iterator<Item = &'a Workload>) -> Workload {
    let mut all = Workload::default();
    let mut tokens = 0.0;
    for workload in workloads {
        all.tokens += workload.tokens;
        all.documents += workload.documents;
        // The head is computed for each adapter apart.
        all.label_rows.extend(&workload.label_rows);
        tokens += workload.mean_length * workload.documents as f64;
    }
    all.mean_length = tokens / all.documents.max(1) as f64;
    all
}

/// An error of one run, with its name.
fn named(error: Error, name: &str) -> Error {
    match error {
        Error::Config { key, message } => {
            Error::config(key, format!("{message} (of adapter `{name}`)"))
        }
        other => other,
    }
}
