use super::same_base::BaseArgs;
use super::{Outcome, print_line};
use ferrotune::core::ExitCode;
use ferrotune::hub;
use ferrotune::lora::{MergeDType, MergeOptions, OutputDirectory, merge};
use std::path::PathBuf;

/// Arguments of `merge`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory of the base model, or its name on the hub: OWNER/NAME or OWNER/NAME@REVISION
    #[arg(long)]
    model_name_or_path: String,
    /// Directory of the adapter, or its name on the hub
    #[arg(long)]
    adapter: String,
    #[command(flatten)]
    same_base: BaseArgs,
    /// Directory to write
    #[arg(long)]
    output_dir: PathBuf,
    /// Element type of the result
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    dtype: Dtype,
    /// Replace an output directory that is not empty
    #[arg(long)]
    overwrite: bool,
    /// The report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Dtype {
    /// As the base has it
    Auto,
    /// 32-bit floats
    Float32,
    /// Brain floats
    Bfloat16,
}

pub(super) fn run(args: &Args) -> Outcome {
    let options = MergeOptions {
        dtype: match args.dtype {
            Dtype::Auto => MergeDType::SameAsBase,
            Dtype::Float32 => MergeDType::Float32,
            Dtype::Bfloat16 => MergeDType::BFloat16,
        },
        output: if args.overwrite {
            OutputDirectory::Replace
        } else {
            OutputDirectory::MustBeNew
        },
    };
    let base = hub::model(&args.model_name_or_path, None, "model_name_or_path")?;
    let adapter = hub::adapter(&args.adapter, "adapter")?;
    args.same_base.check(&base, &adapter)?;
    let report = merge(&base, &adapter, &args.output_dir, &options)?;
    let (worst, error) = report
        .worst()
        .map_or(("none", 0.0), |t| (t.name.as_str(), t.relative_error));
    if args.json {
        let document = serde_json::json!({
            "merged_tensors": report.tensors.len(),
            "files": report.files,
            "bytes": report.bytes,
            "worst_tensor": worst,
            "worst_relative_error": error,
        });
        print_line(document)?;
    } else {
        let (count, output) = (report.tensors.len(), args.output_dir.display());
        print_line(format_args!("merged {count} tensors into {output}"))?;
        print_line(format_args!(
            "rounding lost at most {error:.2e} of an update ({worst})"
        ))?;
    }
    Ok(ExitCode::Done)
}
