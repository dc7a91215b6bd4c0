mod adapter;
mod model;

use super::{Failure, Outcome, overrides, print, print_help_of, print_line, print_note, train};
use ferrotune::core::config;
use ferrotune::core::{ExitCode, Result};
use ferrotune::recipe::{Preflight, ShownRow, prepare_data};
use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Rows as training would see them: text, with what is trained marked, and facts about all rows
    Data(DataArgs),
    /// What a base model is made of, and what an adapter would attach to
    Model(model::Args),
    /// What an adapter changes: ranks, norms, effective ranks
    Adapter(adapter::AdapterArgs),
    /// How two adapters differ: configuration, and module by module
    Diff(adapter::DiffArgs),
}

#[derive(Debug, clap::Args)]
struct DataArgs {
    /// Rows to show
    #[arg(long, default_value_t = 3)]
    rows: usize,
    /// Number of the first row to show, counted from 1 among those that are trained
    #[arg(long, default_value_t = 1)]
    first: usize,
    /// YAML file with TRL's keys
    config: PathBuf,
    /// `--key value` for any configuration key; also --json
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "--KEY VALUE"
    )]
    overrides: Vec<String>,
}

pub(super) fn run(args: &Args) -> Outcome {
    match &args.what {
        What::Data(args) => data(args),
        What::Model(args) => model::run(args),
        What::Adapter(args) => adapter::run(args),
        What::Diff(args) => adapter::diff(args),
    }
}

fn data(args: &DataArgs) -> Outcome {
    if overrides::ask_for_help(&args.overrides) {
        return print_help_of("inspect");
    }
    let (mut pairs, switches) = overrides::parse(&args.overrides)?;
    // These are no keys, but may stand where keys do.
    let rows = number(&mut pairs, "rows")?.unwrap_or(args.rows);
    let first = number(&mut pairs, "first")?.unwrap_or(args.first);
    let config = config::load(&args.config, &pairs)?;
    train::print_notes(&config);
    let (tokenizer, dataset) = prepare_data(&config)?;
    if first == 0 || first > dataset.examples.len() {
        return Err(Failure::Usage(format!(
            "--first {first}: there are rows 1 to {}",
            dataset.examples.len()
        )));
    }
    let shown = first - 1..(first - 1).saturating_add(rows);
    let seen = Preflight::of(&tokenizer, &dataset, shown)?;
    if switches.json {
        print_line(seen.json())?;
    } else {
        print_preflight(&seen)?;
    }
    Ok(ExitCode::Done)
}

/// Takes a number called `name` out of what follows the config file.
fn number(pairs: &mut Vec<(String, String)>, name: &str) -> Result<Option<usize>, Failure> {
    let mut found = None;
    for (_, value) in pairs.extract_if(.., |(key, _)| key == name) {
        let number = value.parse();
        found = Some(number.map_err(|_| {
            Failure::Usage(format!("--{name} {value}: a whole number is expected"))
        })?);
    }
    Ok(found)
}

/// Rows, facts, and warnings as notes.
pub(super) fn print_preflight(seen: &Preflight) -> Result<()> {
    let colours = std::io::stdout().is_terminal();
    for row in &seen.rows {
        print(describe(row, colours))?;
    }
    for fact in &seen.facts {
        print_line(fact)?;
    }
    for warning in &seen.warnings {
        print_note(warning);
    }
    Ok(())
}

/// A row with what is trained in green, or between marks where there are no colours.
fn describe(row: &ShownRow, colours: bool) -> String {
    let (begin, end) = if colours {
        ("\x1b[32m", "\x1b[0m")
    } else {
        ("\u{27e6}", "\u{27e7}")
    };
    let mut text = format!(
        "row {}: {} tokens, {} trained\n",
        row.number, row.tokens[0], row.tokens[1]
    );
    for (segment, trained) in &row.segments {
        let written = if *trained {
            write!(text, "{begin}{segment}{end}")
        } else {
            write!(text, "{segment}")
        };
        debug_assert!(written.is_ok(), "memory can be written to");
    }
    text.push_str("\n\n");
    text
}
