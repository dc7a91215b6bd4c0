use super::launch_flags::LaunchFlags;
use super::{Failure, Outcome, print, print_line};
use ferrotune::core::config::Device;
use ferrotune::core::{Error, ExitCode};
use ferrotune::dist::env::{Surroundings, check, detect};
use std::path::PathBuf;

/// Arguments of `env`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    flags: LaunchFlags,
    /// Where ranks would compute: auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    device: Device,
    /// One JSON document
    #[arg(long)]
    json: bool,
    /// Compare recorded environments with what their files expect, instead of reading this one
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "json")]
    check: Vec<PathBuf>,
}

pub(super) fn run(args: &Args) -> Outcome {
    if !args.check.is_empty() {
        return check_files(&args.check);
    }
    let around = Surroundings::of_this_process(args.flags.on(args.device));
    match detect(&around) {
        Ok(found) if args.json => print_line(format_args!("{:#}", found.json()))?,
        Ok(found) => print(found)?,
        Err(error) => {
            if args.json {
                print_line(format_args!("{:#}", error.json()))?;
            }
            return Err(Failure::Env(error));
        }
    }
    Ok(ExitCode::Done)
}

fn check_files(files: &[PathBuf]) -> Outcome {
    let (mut passed, mut failed) = (0, 0);
    for file in files {
        let text = std::fs::read_to_string(file).map_err(Error::read(file))?;
        let cases = check::parse(&text).map_err(|problem| Error::data(file, None, problem))?;
        for case in cases {
            match case.check() {
                Ok(()) => passed += 1,
                Err(problem) => {
                    failed += 1;
                    print_line(format_args!("FAILED {}: {problem}", case.name))?;
                }
            }
        }
    }
    print_line(format_args!("{passed} passed, {failed} failed"))?;
    Ok(if failed == 0 {
        ExitCode::Done
    } else {
        ExitCode::Internal
    })
}
