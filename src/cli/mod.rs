//! The command line: one file per subcommand, and what they share.

mod asked;
mod before_nccl;
mod bench;
mod chat;
mod combine;
mod config_schema;
mod demo;
mod env;
mod eval;
mod exact_match;
mod generate;
mod inspect;
mod kernels;
mod launch;
mod launch_flags;
mod merge;
mod output;
mod overrides;
mod parity;
mod progress;
mod quantise;
mod same_base;
mod several;
mod stop;
mod sweep;
mod train;

use clap::builder::StyledStr;
use clap::{CommandFactory, Parser, Subcommand};
use ferrotune::core::{Error, ExitCode};
use ferrotune::dist::env::EnvError;
use ferrotune::dist::launch::{LaunchError, end_with_launcher};
use output::{print, print_error_line, print_line, print_note};
use std::ffi::OsString;
use std::io::{IsTerminal, stderr, stdout};
use tracing_subscriber::EnvFilter;

/// GPU fine-tuning engine: LoRA and PEFT over frozen base weights.
#[derive(Debug, Parser)]
#[command(name = "ferrotune", version, after_help = after_help())]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fine-tune a model as a YAML file says (TRL's `sft` keys)
    Train(train::Args),
    /// Show what `train` would do, and stop
    Plan(train::Args),
    /// Teach a tiny model something it cannot do, in under a minute, offline
    Demo(demo::Args),
    /// Make one adapter of several, or one of another rank
    Combine(combine::Args),
    /// Fold an adapter into its base model
    Merge(merge::Args),
    /// Answer prompts
    Generate(generate::Args),
    /// Loss and exact match on a data set
    Eval(eval::Args),
    /// Show what is in rows, a model or an adapter
    Inspect(inspect::Args),
    /// Compare with numbers that other software recorded
    Parity(parity::Args),
    /// Tokens per second, share of the machine's peak and memory at a named model shape
    Bench(bench::Args),
    /// Compile the CUDA kernels ahead of a run, list them, check what they take of a GPU
    Kernels(kernels::Args),
    /// Start a command once per rank of this machine, and watch over the ranks
    Launch(launch::Args),
    /// Which rank this process is by its launcher's variables, and which variable said so
    Env(env::Args),
    /// Every configuration key: JSON schema, or a table in Markdown
    ConfigSchema(config_schema::Args),
}

/// What a subcommand ends with: an exit code, or an error that has one.
type Outcome = Result<ExitCode, Failure>;

/// Why a subcommand stopped.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Core(#[from] Error),
    /// The launcher's variables make no sense.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// Ranks could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The arguments make no sense together.
    #[error("{0}")]
    Usage(String),
}

impl Failure {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Core(error) => error.exit_code(),
            Self::Env(error) => error.exit_code(),
            Self::Launch(error) => error.exit_code(),
            Self::Usage(_) => ExitCode::Usage,
        }
    }
}

pub(crate) fn main() -> std::process::ExitCode {
    exit_on_panic();
    if !end_with_launcher() {
        print_error_line("error: the launcher of this rank is gone");
        return std::process::ExitCode::from(ExitCode::Transient as u8);
    }
    start_logging();
    let words = overrides::in_order(std::env::args_os().collect());
    let outcome = match Cli::try_parse_from(words) {
        Ok(cli) => run(cli.command),
        // What was asked for, help or version, is an answer; the rest clap says itself, and exits with 2.
        Err(error) if error.use_stderr() => error.exit(),
        Err(answer) => print_help(&answer.render()),
    };
    let code = outcome.unwrap_or_else(|failure| {
        print_error_line(&format!("error: {failure}"));
        failure.exit_code()
    });
    std::process::ExitCode::from(code as u8)
}

fn run(command: Command) -> Outcome {
    stop::outlive_full_files()?;
    // These stop by themselves, or pass signals on.
    let handles_signals = matches!(
        command,
        Command::Train(_) | Command::Demo(_) | Command::Launch(_)
    );
    if !handles_signals {
        stop::leave_on_signal()?;
    }
    // Those that compute without a configuration of their own.
    let computes = matches!(
        command,
        Command::Combine(_)
            | Command::Merge(_)
            | Command::Generate(_)
            | Command::Eval(_)
            | Command::Parity(_)
    );
    if computes {
        ferrotune::threads::start(None)?;
    }
    match command {
        Command::Train(args) => train::train(&args),
        Command::Plan(args) => train::plan(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Combine(args) => combine::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Parity(args) => parity::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Launch(args) => launch::run(&args),
        Command::Env(args) => env::run(&args),
        Command::ConfigSchema(args) => config_schema::run(&args),
    }
}

/// Help, in colours where a person reads it.
fn print_help(help: &StyledStr) -> Outcome {
    if stdout().is_terminal() {
        print(help.ansi())?;
    } else {
        print(help)?;
    }
    Ok(ExitCode::Done)
}

/// The help of a subcommand, for one that gets the request among its own words.
fn print_help_of(subcommand: &str) -> Outcome {
    let mut cli = Cli::command();
    cli.build();
    match cli.find_subcommand_mut(subcommand) {
        Some(command) => print_help(&command.render_help()),
        None => Ok(ExitCode::Done),
    }
}

/// TRL's habit and clap's both work: `--model_name_or_path` is `--model-name-or-path`.
fn either_spelling(word: OsString) -> OsString {
    let Some(flag) = word.to_str().filter(|w| w.starts_with("--")) else {
        return word;
    };
    let (name, value) = flag.split_at(flag.find('=').unwrap_or(flag.len()));
    let is_name = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    if is_name {
        format!("{}{value}", name.replace('_', "-")).into()
    } else {
        word
    }
}

/// A panic is an internal error like any other: message, place, code 70. A thread that finds no memory for its
/// stack panics too, before any code of ours: 71.
fn exit_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if ferrotune::core::panic_is_expected() {
            return;
        }
        default(info);
        let code = match info.to_string().contains("Cannot allocate memory") {
            true => ExitCode::OutOfMemory,
            false => ExitCode::Internal,
        };
        std::process::exit(code as i32);
    }));
}

/// Warnings on standard error; `RUST_LOG` chooses more or less.
fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        // A log that cannot be written is no reason to fail.
        .log_internal_errors(false)
        .with_target(false)
        .without_time()
        .init();
}

fn after_help() -> String {
    let codes: Vec<String> = ferrotune::core::EXIT_CODES
        .iter()
        .map(|(code, meaning)| format!("  {:>3}  {meaning}", *code as u8))
        .collect();
    format!(
        "Exit codes (below 128: do not retry):\n{}",
        codes.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_understood_with_underscores_and_values_left_alone() {
        let spelled = |word: &str| either_spelling(word.into());
        assert_eq!(spelled("--exact_match"), "--exact-match");
        assert_eq!(spelled("--output_dir=a_b"), "--output-dir=a_b");
        assert_eq!(spelled("--a_b is a prompt"), "--a_b is a prompt");
        assert_eq!(spelled("under_score"), "under_score");
    }
}
