use super::{Failure, Outcome, print_line};
use ferrotune::core::ExitCode;
use ferrotune::core::config::{json_schema, markdown_reference};

/// Arguments of `config-schema`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A table of all keys in Markdown instead of JSON schema
    #[arg(long)]
    markdown: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    if args.markdown {
        print_line(markdown_reference())?;
    } else {
        let text = serde_json::to_string_pretty(&json_schema());
        print_line(text.map_err(|e| Failure::Usage(e.to_string()))?)?;
    }
    Ok(ExitCode::Done)
}
