//! Several adapters over one base in one run: `adapters` in a configuration, or `--sweep`.

use super::output::STANDARD_OUTPUT;
use super::progress::Progress;
use super::train::{self, Voice};
use super::{Failure, Outcome, print, print_error_line, print_line};
use ferrotune::core::config::NamedConfig;
use ferrotune::core::run_log::{JsonLines, Observer};
use ferrotune::core::trainer::RunOutcome;
use ferrotune::core::{Error, ExitCode};
use ferrotune::dist::env::LaunchEnv;
use ferrotune::recipe::{Ended, Recipe, Summary, Together};
use serde_json::json;
use std::sync::atomic::AtomicBool;

/// Trains all; the first error of one of them is the run's, once the others are done.
pub(super) fn run(
    configs: Vec<NamedConfig>,
    found: &LaunchEnv,
    voice: Voice,
    stop: &AtomicBool,
) -> Outcome {
    require_one_process(found)?;
    let together = Together::prepare(configs)?;
    print_notes(&together);
    if voice == Voice::Person {
        print_line(plan_of(&together)?)?;
    }
    let names = together.runs().map(|(name, _)| name.chars().count());
    let width = names.max().unwrap_or(0);
    let ended = together.train(|name| vec![observer(name, width, voice)], stop)?;
    if voice == Voice::Person {
        print_line(table(&together, &ended))?;
    }
    exit(ended)
}

/// What a run would do.
pub(super) fn show_plan(configs: Vec<NamedConfig>, found: &LaunchEnv, voice: Voice) -> Outcome {
    require_one_process(found)?;
    let together = Together::prepare(configs)?;
    match voice {
        Voice::Person => {
            print_notes(&together);
            print(plan_of(&together)?)?;
        }
        Voice::Machine => {
            let mut plans = Vec::new();
            for (name, recipe) in together.runs() {
                let mut plan = Summary::of(recipe)?.json().clone();
                plan["name"] = json!(name);
                plans.push(plan);
            }
            print_line(json!({ "adapters": plans }))?;
        }
    }
    Ok(ExitCode::Done)
}

fn require_one_process(found: &LaunchEnv) -> Result<(), Failure> {
    if found.world_size == 1 {
        return Ok(());
    }
    let message = format!(
        "several adapters in one run train in one process, and there are {} ranks; start it on one, with --nproc 1 or \
         --standalone, or train one adapter at a time",
        found.world_size
    );
    Err(Error::config("adapters", message).into())
}

fn observer(name: &str, width: usize, voice: Voice) -> Box<dyn Observer> {
    match voice {
        Voice::Person => Box::new(Progress::of(&format!("{name:width$}"))),
        Voice::Machine => {
            Box::new(JsonLines::new(std::io::stdout(), STANDARD_OUTPUT).of_adapter(name))
        }
    }
}

/// Notes of all runs; what several have in common is said once.
fn print_notes(together: &Together) {
    let mut said = Vec::new();
    for (_, recipe) in together.runs() {
        for note in &recipe.config.notes {
            if !said.contains(&note) {
                super::print_note(note);
                said.push(note);
            }
        }
    }
}

/// The plan of the first run, and what each of them is.
fn plan_of(together: &Together) -> Result<String, Failure> {
    let mut rows = vec![
        [
            "adapter",
            "method",
            "trainable",
            "rows",
            "steps",
            "learning rate",
        ]
        .map(String::from),
    ];
    let mut model = None;
    for (name, recipe) in together.runs() {
        model.get_or_insert_with(|| recipe.base.display().to_string());
        rows.push([
            name.to_owned(),
            recipe.adapter()?.describe(),
            recipe.trainable.to_string(),
            recipe.dataset.report.rows.to_string(),
            recipe.plan.total_steps.to_string(),
            rate(recipe),
        ]);
    }
    Ok(format!(
        "model  {}\n{}",
        model.unwrap_or_default(),
        aligned(&rows)
    ))
}

fn rate(recipe: &Recipe) -> String {
    format!("{:e}", recipe.config.optimizer.learning_rate)
}

/// One line per run, in the order of the configuration.
fn table(together: &Together, ended: &[Ended]) -> String {
    let mut rows = vec![["adapter", "steps", "loss", "eval loss", "output"].map(String::from)];
    for (ended, (_, recipe)) in ended.iter().zip(together.runs()) {
        let (steps, loss) = match &ended.outcome {
            Ok(RunOutcome::Finished(run)) if run.steps == 0 => {
                (run.step.to_string(), "was finished".to_owned())
            }
            Ok(RunOutcome::Finished(run)) => {
                (run.step.to_string(), format!("{:.4}", run.train_loss))
            }
            Ok(RunOutcome::Stopped { step, .. }) => (step.to_string(), "stopped".to_owned()),
            Err(_) => (
                format!("of {}", recipe.plan.total_steps),
                "failed".to_owned(),
            ),
        };
        let eval = ended.evaluated.as_ref();
        rows.push([
            ended.name.clone(),
            steps,
            loss,
            eval.map_or_else(String::new, |eval| format!("{:.4}", eval.loss)),
            ended.output.display().to_string(),
        ]);
    }
    aligned(&rows)
}

/// Columns as wide as their widest cell, two blanks apart.
fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        line.trim_end().to_owned() + "\n"
    });
    lines.collect()
}

/// The errors, each with its adapter, and the exit code of all: that of the first error, else of a stop.
fn exit(ended: Vec<Ended>) -> Outcome {
    let mut code = ExitCode::Done;
    let mut first: Option<Error> = None;
    for Ended { name, outcome, .. } in ended {
        match outcome {
            Ok(outcome) => {
                let own = train::exit_code(&outcome);
                if own != ExitCode::Done && code != ExitCode::StoppedUnsaved {
                    code = own;
                }
            }
            Err(error) if first.is_none() => {
                print_error_line(&format!("adapter `{name}` failed:"));
                first = Some(error);
            }
            Err(error) => print_error_line(&format!("adapter `{name}` failed: {error}")),
        }
    }
    match first {
        Some(error) => Err(error.into()),
        None => Ok(code),
    }
}
