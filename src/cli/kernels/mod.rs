mod build;
mod list;
mod table;
#[cfg(test)]
mod tests;

use super::{Failure, Outcome, print, print_error_line, print_line};
use build::Build;
use ferrotune::core::suggest::did_you_mean;
use ferrotune::core::{ExitCode, Result};
use ferrotune::kernels::cuda::ARCHITECTURES;
use std::path::PathBuf;

/// Arguments of `kernels`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Architectures, like sm_80,sm_90a; all that ferrotune knows if not given
    #[arg(long, value_delimiter = ',', value_parser = architecture)]
    arch: Vec<String>,
    /// Write every module, compiled, into this folder, to be named in FERROTUNE_KERNELS
    #[arg(long)]
    out: Option<PathBuf>,
    /// Modules, their kernels, and where a run would find their cubins; compiles nothing
    #[arg(long, conflicts_with_all = ["out", "check", "write"])]
    list: bool,
    /// Compare registers, spills, stack and shared memory with this table, and fail beyond its bounds
    #[arg(long, value_name = "TABLE")]
    check: Option<PathBuf>,
    /// Write that table anew
    #[arg(long, value_name = "TABLE", conflicts_with = "check")]
    write: Option<PathBuf>,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let architectures = if args.arch.is_empty() {
        ARCHITECTURES.map(|(name, _)| name.to_owned()).to_vec()
    } else {
        args.arch.clone()
    };
    if args.list {
        return list::run(&architectures, args.json);
    }
    let bounds = args.check.is_some() || args.write.is_some();
    if let Some(ptx) = architectures.iter().find(|arch| !arch.starts_with("sm_"))
        && bounds
    {
        let message = format!("{ptx} is PTX, which has no registers yet; a table needs sm_*");
        return Err(Failure::Usage(message));
    }
    let recorded = args.check.as_deref().map(table::Table::read).transpose()?;
    if let Some(folder) = &args.out {
        ferrotune::core::io::probe_writable(folder)?;
    }
    let build = Build::new(architectures)?;
    let files = match &args.out {
        Some(folder) => build.save(folder)?,
        None => Vec::new(),
    };
    if let Some(path) = &args.write {
        table::write(path, &build)?;
    }
    let violations = recorded.map(|table| table.violations(&build));
    if args.json {
        print_json(&build, &files, violations.as_deref())?;
    } else {
        print_text(args, &build, &files, violations.as_deref())?;
    }
    Ok(match violations {
        Some(violations) if !violations.is_empty() => ExitCode::Internal,
        _ => ExitCode::Done,
    })
}

fn print_text(
    args: &Args,
    build: &Build,
    files: &[PathBuf],
    violations: Option<&[String]>,
) -> Result<()> {
    if let Some(folder) = &args.out {
        let count = files.len();
        print_line(format_args!("{count} files in {}", folder.display()))?;
    }
    if let Some(path) = &args.write {
        print_line(format_args!("wrote {}", path.display()))?;
    }
    if let (Some(path), Some(violations)) = (&args.check, violations) {
        for violation in violations {
            print_error_line(violation);
        }
        let (modules, verdict) = (build.modules.len(), violations.len());
        let table = path.display();
        print_line(format_args!(
            "{modules} cubins against {table}: {verdict} violations"
        ))?;
    }
    if args.out.is_none() && args.write.is_none() && args.check.is_none() {
        print(build.table())?;
    }
    Ok(())
}

fn print_json(
    build: &Build,
    files: &[PathBuf],
    violations: Option<&[String]>,
) -> Result<(), Failure> {
    let mut document = build.json();
    document["files"] = serde_json::json!(files);
    if let Some(violations) = violations {
        document["violations"] = serde_json::json!(violations);
    }
    print_document(&document)
}

fn print_document(document: &serde_json::Value) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(document);
    print_line(text.map_err(|e| Failure::Usage(e.to_string()))?)?;
    Ok(())
}

/// An architecture that kernels are compiled for, or the PTX of one: `sm_90a`, `compute_90`.
fn architecture(name: &str) -> Result<String, String> {
    let ptx = ARCHITECTURES.map(|(_, (major, minor))| format!("compute_{major}{minor}"));
    let known = ARCHITECTURES.map(|(name, _)| name);
    if known.contains(&name) || ptx.iter().any(|known| known == name) {
        return Ok(name.to_owned());
    }
    let hint = did_you_mean(name, known);
    Err(format!(
        "kernels are compiled for {}, or as PTX for {}{hint}",
        known.join(", "),
        ptx.join(", ")
    ))
}
