use super::launch_flags::LaunchFlags;
use super::output::STANDARD_OUTPUT;
use super::overrides::{self, Switches};
use super::progress::Progress;
use super::{
    Failure, Outcome, before_nccl, inspect, launch, print, print_help_of, print_line, print_note,
    several, stop, sweep,
};
use ferrotune::core::config::{self, Runs, TrainConfig};
use ferrotune::core::process_group::{Place, ProcessGroup, Solo};
use ferrotune::core::run_log::{JsonLines, Observer};
use ferrotune::core::trainer::RunOutcome;
use ferrotune::core::{ExitCode, Result};
use ferrotune::dist::env::{LaunchEnv, Scope, Surroundings, detect};
use ferrotune::ranks;
use ferrotune::recipe::{LeastTime, Preflight, Recipe, Summary};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Rows that a plan shows.
const SHOWN_ROWS: usize = 2;

/// Arguments of `train` and `plan`.
#[derive(Debug, clap::Args)]
#[command(after_help = overrides::HELP)]
pub(super) struct Args {
    /// YAML file with TRL's keys (see `config-schema --markdown`)
    config: PathBuf,
    /// `--key value` for any configuration key; also --dry-run, --json, and --sweep KEY=V1,V2 for one adapter per value
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "--KEY VALUE"
    )]
    overrides: Vec<String>,
}

/// What standard output is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Voice {
    /// A person watches a terminal.
    Person,
    /// One JSON line per event.
    Machine,
}

impl Voice {
    fn new(switches: Switches) -> Self {
        if switches.json || !std::io::stdout().is_terminal() {
            Self::Machine
        } else {
            Self::Person
        }
    }
}

pub(super) fn train(args: &Args) -> Outcome {
    if overrides::ask_for_help(&args.overrides) {
        return print_help_of("train");
    }
    let stop = stop::on_signal()?;
    let (runs, flags, switches) = args.load()?;
    let voice = Voice::new(switches);
    let found = peers(first(&runs), &flags)?;
    let config = match runs {
        Runs::One(config) => *config,
        Runs::Several(configs) if switches.dry_run => {
            return several::show_plan(configs, &found, voice);
        }
        Runs::Several(configs) => return several::run(configs, &found, voice, &stop),
    };
    if switches.dry_run {
        return show_plan(config, Some(&found), voice);
    }
    if found.scope == Scope::Pod && found.ranks.len() > 1 {
        return launch::this_program(&found, &config, stop);
    }
    before_nccl::advise(&found, &config)?;
    let outcome = run(config, Some(&found), voice, &stop)?;
    Ok(exit_code(&outcome))
}

pub(super) fn plan(args: &Args) -> Outcome {
    if overrides::ask_for_help(&args.overrides) {
        return print_help_of("plan");
    }
    let (runs, flags, switches) = args.load()?;
    let (found, voice) = (peers(first(&runs), &flags)?, Voice::new(switches));
    match runs {
        Runs::One(config) => show_plan(*config, Some(&found), voice),
        Runs::Several(configs) => several::show_plan(configs, &found, voice),
    }
}

/// The configuration that says what all runs have in common.
pub(super) fn first(runs: &Runs) -> &TrainConfig {
    match runs {
        Runs::One(config) => config,
        Runs::Several(configs) => &configs[0].config,
    }
}

/// Which ranks there are, by flags and launcher.
fn peers(config: &TrainConfig, flags: &LaunchFlags) -> Result<LaunchEnv, Failure> {
    let found = detect(&Surroundings::of_this_process(
        flags.on(config.runtime.device),
    ))?;
    if found.ranks.contains(&0) {
        for warning in &found.warnings {
            print_note(&warning.text);
        }
    }
    Ok(found)
}

impl Args {
    /// What to train, what the command line says about ranks, and how to speak.
    pub(super) fn load(&self) -> Result<(Runs, LaunchFlags, Switches), Failure> {
        let (flags, words) = LaunchFlags::take(&self.overrides)?;
        let (axes, words) = sweep::take(&words)?;
        let (pairs, switches) = overrides::parse(&words)?;
        let runs = config::load_runs(&self.config, &pairs, &axes)?;
        Ok((runs, flags, switches))
    }
}

/// Prepares, joins the other ranks of `found`, and trains; alone without it. Rank 0 speaks, as `voice` says.
pub(super) fn run(
    config: TrainConfig,
    found: Option<&LaunchEnv>,
    voice: Voice,
    stop: &AtomicBool,
) -> Result<RunOutcome, Failure> {
    let place = found.map(ranks::place).transpose()?.unwrap_or_default();
    let recipe = Recipe::prepare_at(place, config)?;
    if !place.is_first() {
        let group = group(found, &recipe, stop)?;
        return Ok(recipe.train_with(group, &mut [], stop)?);
    }
    print_notes(&recipe.config);
    for line in recipe.dataset.report.unused_lines() {
        print_note(&line);
    }
    let output = PathBuf::from(&recipe.config.output.output_dir);
    let mut observers: Vec<Box<dyn Observer>> = Vec::new();
    match voice {
        Voice::Person => {
            print_line(Summary::of(&recipe)?)?;
            observers.push(Box::new(Progress::new()));
        }
        Voice::Machine => {
            observers.push(Box::new(JsonLines::new(std::io::stdout(), STANDARD_OUTPUT)));
        }
    }
    let group = group(found, &recipe, stop)?;
    let outcome = recipe.train_with(group, &mut observers, stop)?;
    drop(observers);
    report(&outcome, &output, voice)?;
    Ok(outcome)
}

fn group(
    found: Option<&LaunchEnv>,
    recipe: &Recipe,
    stop: &AtomicBool,
) -> Result<Box<dyn ProcessGroup>> {
    match found {
        Some(found) => ranks::join(found, recipe, stop),
        None => Ok(Box::new(Solo)),
    }
}

pub(super) fn exit_code(outcome: &RunOutcome) -> ExitCode {
    match outcome {
        RunOutcome::Finished(_) => ExitCode::Done,
        RunOutcome::Stopped {
            checkpoint: Some(_),
            ..
        } => ExitCode::StoppedSaved,
        RunOutcome::Stopped {
            checkpoint: None, ..
        } => ExitCode::StoppedUnsaved,
    }
}

/// The plan of rank 0 among the ranks of `found`.
pub(super) fn show_plan(config: TrainConfig, found: Option<&LaunchEnv>, voice: Voice) -> Outcome {
    let place = Place {
        world_size: found.map_or(1, |f| f.world_size),
        local_world_size: found.and_then(|f| f.local_world_size).unwrap_or(1),
        ..Place::SOLO
    };
    let recipe = Recipe::prepare_at(place, config)?;
    let summary = Summary::of(&recipe)?.with_time(&LeastTime::measure(&recipe)?);
    match voice {
        Voice::Person => {
            print_notes(&recipe.config);
            print(summary)?;
            print_line("")?;
            let seen = Preflight::of(&recipe.tokenizer, &recipe.dataset, 0..SHOWN_ROWS)?;
            inspect::print_preflight(&seen)?;
        }
        Voice::Machine => {
            let seen = Preflight::of(&recipe.tokenizer, &recipe.dataset, 0..SHOWN_ROWS)?;
            let mut document = summary.json().clone();
            document["preflight"] = seen.json().clone();
            print_line(document)?;
        }
    }
    Ok(ExitCode::Done)
}

pub(super) fn print_notes(config: &TrainConfig) {
    for note in &config.notes {
        print_note(note);
    }
}

fn report(outcome: &RunOutcome, output: &Path, voice: Voice) -> Result<()> {
    if let RunOutcome::Finished(run) = outcome
        && run.steps == 0
    {
        let output = output.display();
        print_note(&format!(
            "already finished after step {}: {output}",
            run.step
        ));
        return Ok(());
    }
    if voice == Voice::Machine {
        return Ok(());
    }
    match outcome {
        RunOutcome::Finished(run) => print_line(format_args!(
            "done: {} steps, mean loss {:.4}, {:.1} s\n      {}",
            run.step,
            run.train_loss,
            run.train_runtime,
            output.display()
        )),
        RunOutcome::Stopped {
            step,
            checkpoint: Some(path),
        } => print_line(format_args!(
            "stopped after step {step}; go on with --resume_from_checkpoint auto ({})",
            path.display()
        )),
        RunOutcome::Stopped { .. } => print_line("stopped before the first step; nothing to save"),
    }
}
