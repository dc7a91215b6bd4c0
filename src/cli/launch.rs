use super::before_nccl;
use super::launch_flags::LaunchFlags;
use super::stop::Stop;
use super::{Cli, Command, Failure, Outcome, overrides, print_note, train};
use clap::Parser;
use ferrotune::core::config::{Device, TrainConfig};
use ferrotune::core::{EXIT_CODES, Error, ExitCode};
use ferrotune::dist::env::{LaunchEnv, Scope, Surroundings, detect};
use ferrotune::dist::launch::{GRACE, Launch, supervise};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::time::Duration;

/// Arguments of `launch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: ferrotune launch --nproc 4 -- train config.yaml --device cpu")]
pub(super) struct Args {
    #[command(flatten)]
    flags: LaunchFlags,
    /// Where ranks compute: auto, cpu or cuda [default: as the configuration of `train` says]
    #[arg(long)]
    device: Option<Device>,
    /// Start this program instead of ferrotune itself
    #[arg(long, value_name = "PATH")]
    program: Option<PathBuf>,
    /// Seconds that ranks get to end by themselves after another one failed
    #[arg(long, value_name = "SECONDS", default_value_t = GRACE.as_secs(), value_parser = clap::value_parser!(u64).range(0..=86_400))]
    grace: u64,
    /// A subcommand of ferrotune with its arguments, after `--`; or those of --program
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(super) fn run(args: &Args) -> Outcome {
    let mut words = args.command.clone();
    let mut device = args.device.unwrap_or(Device::Auto);
    let mut config = None;
    if args.program.is_none()
        && let Command::Train(asked) = command_of(&words).command
    {
        match args.device {
            Some(device) => words.extend(["--device".into(), device.as_str().into()]),
            // A configuration that is wrong is reported here, once.
            None => {
                let (loaded, ..) = asked.load()?;
                let loaded = train::first(&loaded);
                device = loaded.runtime.device;
                config = Some(loaded.clone());
            }
        }
    }
    let around = Surroundings::of_this_process(args.flags.on(device));
    let found = detect(&around)?;
    for warning in &found.warnings {
        print_note(&warning.text);
    }
    let launch = Launch {
        program: program(args.program.as_ref())?,
        arguments: words,
        variables: before_nccl::variables(&found, config.as_ref())?,
        grace: Duration::from_secs(args.grace),
    };
    if found.scope == Scope::Process {
        return become_rank(&launch, &found, &args.flags);
    }
    outcome(supervise(&launch, &found)?)
}

/// Starts this program again with the same arguments for each rank of this pod.
pub(super) fn this_program(found: &LaunchEnv, config: &TrainConfig, stop: Stop) -> Outcome {
    let launch = Launch {
        program: program(None)?,
        arguments: std::env::args_os().skip(1).collect(),
        variables: before_nccl::variables(found, Some(config))?,
        grace: GRACE,
    };
    if stop.hand_over() {
        return Ok(ExitCode::StoppedUnsaved);
    }
    outcome(supervise(&launch, found)?)
}

/// Ends here with clap's message if it is none.
fn command_of(words: &[OsString]) -> Cli {
    let name = std::iter::once(OsString::from("ferrotune"));
    let words = name.chain(words.iter().cloned()).collect();
    Cli::parse_from(overrides::in_order(words))
}

fn program(given: Option<&PathBuf>) -> Result<PathBuf, Failure> {
    match given {
        Some(path) => Ok(path.clone()),
        None => Ok(std::env::current_exe().map_err(Error::read("this program's own file"))?),
    }
}

/// Another launcher has started this process as one rank: there is nothing to watch over.
fn become_rank(launch: &Launch, found: &LaunchEnv, flags: &LaunchFlags) -> Outcome {
    print_note(&format!(
        "{} started this process as rank {}; running the command as that rank",
        found.launcher, found.ranks[0]
    ));
    let problem = std::process::Command::new(&launch.program)
        .args(&launch.arguments)
        .envs(&launch.variables)
        .envs(flags.master_variables())
        .exec();
    Err(Failure::Core(Error::read(&launch.program)(problem)))
}

/// Ranks end with ferrotune's codes; another program's code is passed on as it is.
fn outcome(code: u8) -> Outcome {
    let known = EXIT_CODES.iter().find(|(known, _)| *known as u8 == code);
    match known {
        Some((code, _)) => Ok(*code),
        None => std::process::exit(code.into()),
    }
}
