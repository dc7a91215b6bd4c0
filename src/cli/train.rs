use super::launch_flags::LaunchFlags;
use super::output::STANDARD_OUTPUT;
use super::overrides::{self, Switches};
use super::progress::Progress;
use super::{Failure, Outcome, launch, print, print_help_of, print_line, print_note, stop};
use ferrotune::core::config::{self, TrainConfig};
use ferrotune::core::run_log::{JsonLines, Observer};
use ferrotune::core::trainer::RunOutcome;
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::dist::env::{LaunchEnv, Scope, Surroundings, detect};
use ferrotune::recipe::{Recipe, Summary};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// Arguments of `train` and `plan`.
#[derive(Debug, clap::Args)]
#[command(after_help = overrides::HELP)]
pub(super) struct Args {
    /// YAML file with TRL's keys (see `config-schema --markdown`)
    config: PathBuf,
    /// `--key value` for any configuration key; also --dry-run and --json
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
    let (config, flags, switches) = args.load()?;
    let voice = Voice::new(switches);
    if switches.dry_run {
        return show_plan(config, voice);
    }
    let found = detect(&Surroundings::of_this_process(
        flags.on(config.runtime.device),
    ))?;
    for warning in &found.warnings {
        print_note(&warning.text);
    }
    if found.scope == Scope::Pod && found.ranks.len() > 1 {
        return launch::this_program(&found, stop);
    }
    refuse_several_ranks(&found)?;
    let outcome = run(config, voice, &stop)?;
    Ok(exit_code(&outcome))
}

pub(super) fn plan(args: &Args) -> Outcome {
    if overrides::ask_for_help(&args.overrides) {
        return print_help_of("plan");
    }
    let (config, _, switches) = args.load()?;
    show_plan(config, Voice::new(switches))
}

impl Args {
    /// The configuration, what the command line says about ranks, and how to speak.
    pub(super) fn load(&self) -> Result<(TrainConfig, LaunchFlags, Switches), Failure> {
        let (flags, words) = LaunchFlags::take(&self.overrides)?;
        let (pairs, switches) = overrides::parse(&words)?;
        Ok((config::load(&self.config, &pairs)?, flags, switches))
    }
}

/// Ranks that do not train together would train the same thing twice, into the same files.
fn refuse_several_ranks(found: &LaunchEnv) -> Result<(), Failure> {
    if found.world_size == 1 {
        return Ok(());
    }
    let (launcher, ranks) = (found.launcher, found.world_size);
    Err(Failure::Core(Error::config(
        "world_size",
        format!("{launcher} starts {ranks} ranks, and `train` cannot join them yet; start one"),
    )))
}

/// Prepares and trains with the observers that `voice` calls for.
pub(super) fn run(
    config: TrainConfig,
    voice: Voice,
    stop: &std::sync::atomic::AtomicBool,
) -> Result<RunOutcome, Failure> {
    let recipe = Recipe::prepare(config)?;
    print_notes(&recipe.config);
    let output = PathBuf::from(&recipe.config.output.output_dir);
    let mut observers: Vec<Box<dyn Observer>> = Vec::new();
    match voice {
        Voice::Person => {
            print_line(Summary::of(&recipe)?)?;
            observers.push(Box::new(Progress::new()));
        }
        Voice::Machine => {
            observers.push(Box::new(JsonLines::new(std::io::stdout(), STANDARD_OUTPUT)))
        }
    }
    let outcome = recipe.train(&mut observers, stop)?;
    drop(observers);
    report(&outcome, &output, voice)?;
    Ok(outcome)
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

pub(super) fn show_plan(config: TrainConfig, voice: Voice) -> Outcome {
    let recipe = Recipe::prepare(config)?;
    let summary = Summary::of(&recipe)?;
    match voice {
        Voice::Person => {
            print_notes(&recipe.config);
            print(summary)?;
        }
        Voice::Machine => print_line(summary.json())?,
    }
    Ok(ExitCode::Done)
}

fn print_notes(config: &TrainConfig) {
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
