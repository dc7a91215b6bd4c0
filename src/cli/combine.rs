use super::same_base::BaseArgs;
use super::{Outcome, print_line};
use ferrotune::core::{Error, ExitCode};
use ferrotune::hub;
use ferrotune::lora::{Arithmetic, Combination, CombineOptions, MajoritySign, combine};
use std::path::{Path, PathBuf};

/// Arguments of `combine`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory of an adapter or its name on the hub, with its weight behind `=`, 1 by default; given once for each
    #[arg(long, required = true, value_name = "ADAPTER[=WEIGHT]")]
    adapter: Vec<String>,
    #[command(flatten)]
    same_base: BaseArgs,
    /// Directory to write
    #[arg(long)]
    output_dir: PathBuf,
    /// cat, linear, svd, magnitude_prune, ties, dare_linear or dare_ties
    #[arg(long, default_value = "linear", value_parser = Combination::from_name)]
    combination_type: Combination,
    /// Rank of the result; what it leaves out is reported
    #[arg(long)]
    rank: Option<usize>,
    /// Share of the elements that pruning leaves
    #[arg(long, default_value_t = 1.0)]
    density: f64,
    /// How ties elects signs
    #[arg(long, value_enum, default_value_t = Sign::Total)]
    majority_sign_method: Sign,
    /// Add A to A and B to B as PEFT does in all but cat and svd: products of one adapter's A with
    /// another's B come in, which are no part of either
    #[arg(long)]
    as_peft: bool,
    /// Seed of dare_linear and dare_ties
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Replace an output directory that is not empty
    #[arg(long)]
    overwrite: bool,
    /// The report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Sign {
    /// By the sum of the values
    Total,
    /// By the number of signs
    Frequency,
}

pub(super) fn run(args: &Args) -> Outcome {
    let adapters: Vec<(PathBuf, f64)> = args
        .adapter
        .iter()
        .map(|text| weighted(text))
        .collect::<Result<_, _>>()?;
    let options = CombineOptions {
        combination: args.combination_type,
        rank: args.rank,
        density: args.density,
        majority_sign: match args.majority_sign_method {
            Sign::Total => MajoritySign::Total,
            Sign::Frequency => MajoritySign::Frequency,
        },
        arithmetic: if args.as_peft {
            Arithmetic::AsPeft
        } else {
            Arithmetic::Updates
        },
        seed: args.seed,
    };
    let output = &args.output_dir;
    let is_taken = std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some());
    if is_taken && !args.overwrite {
        let message = format!(
            "{} is not empty; choose another or pass --overwrite",
            output.display()
        );
        return Err(Error::config("output_dir", message).into());
    }
    if adapters
        .iter()
        .any(|(directory, _)| same(directory, output))
    {
        let message = format!("{} is one of the adapters", output.display());
        return Err(Error::config("output_dir", message).into());
    }
    let places: Vec<&Path> = adapters.iter().map(|(at, _)| at.as_path()).collect();
    args.same_base.check_together(&places)?;
    let report = combine(&adapters, output, &options)?;
    let (worst, error) = report
        .worst()
        .map_or(("none", 0.0), |m| (m.name.as_str(), m.relative_error));
    let ranks = report.modules.iter().map(|module| module.rank);
    let (least, most) = (ranks.clone().min().unwrap_or(0), ranks.max().unwrap_or(0));
    if args.json {
        let modules = report.modules.iter().map(|module| {
            serde_json::json!({
                "module": module.name, "rank": module.rank, "relative_error": module.relative_error,
            })
        });
        let document = serde_json::json!({ "modules": modules.collect::<Vec<_>>() });
        print_line(document)?;
    } else {
        let count = report.modules.len();
        let (adapters, output) = (adapters.len(), output.display());
        print_line(format_args!(
            "combined {adapters} adapters in {count} modules, rank {least} to {most}, into {output}"
        ))?;
        print_line(format_args!(
            "the rank leaves out at most {error:.2e} of an update ({worst})"
        ))?;
    }
    Ok(ExitCode::Done)
}

/// `ADAPTER` or `ADAPTER=WEIGHT`.
fn weighted(text: &str) -> Result<(PathBuf, f64), Error> {
    let (name, weight) = match text.rsplit_once('=') {
        // A path may have such a character.
        Some(_) if PathBuf::from(text).is_dir() => (text, 1.0),
        None => (text, 1.0),
        Some((name, weight)) => match weight.parse() {
            Ok(weight) => (name, weight),
            Err(_) => {
                let message = format!("`{text}`: `{weight}` is no number; expected ADAPTER=WEIGHT");
                return Err(Error::config("adapter", message));
            }
        },
    };
    Ok((hub::adapter(name, "adapter")?, weight))
}

fn same(a: &PathBuf, b: &PathBuf) -> bool {
    match (std::fs::canonicalize(a), std::fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
