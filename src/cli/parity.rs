use super::{Failure, Outcome, print_error_line, print_line};
use ferrotune::core::config::Device;
use ferrotune::core::{ExitCode, Result};
use ferrotune::parity::{CaseReport, Quantity, run as run_case};
use std::path::PathBuf;

/// Arguments of `parity`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Case folders, each with a case.json
    #[arg(required = true)]
    cases: Vec<PathBuf>,
    /// Where to recompute: auto, cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// One JSON document instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let device = ferrotune::device::open(args.device)?;
    let mut reports = Vec::new();
    for case in &args.cases {
        let report = run_case(case, &device);
        if !args.json {
            print_case(&report)?;
        }
        reports.push(report);
    }
    let passed = reports.iter().filter(|r| r.passed).count();
    let failed = reports.len() - passed;
    if args.json {
        let document = serde_json::json!({ "cases": reports, "passed": passed, "failed": failed });
        let text = serde_json::to_string_pretty(&document);
        print_line(text.map_err(|e| Failure::Usage(e.to_string()))?)?;
    }
    let tally = format!("{passed} passed, {failed} failed");
    if args.json {
        // Standard output is the document alone.
        print_error_line(&tally);
    } else {
        print_line(tally)?;
    }
    Ok(if failed == 0 {
        ExitCode::Done
    } else {
        ExitCode::Internal
    })
}

fn print_case(report: &CaseReport) -> Result<()> {
    let verdict = if report.passed { "ok" } else { "FAILED" };
    let case = report.case.display();
    print_line(format_args!("{case}  [{}]  {verdict}", report.kind))?;
    if let Some(error) = &report.error {
        print_line(format_args!("    {error}"))?;
    }
    report.quantities.iter().try_for_each(print_quantity)
}

fn print_quantity(q: &Quantity) -> Result<()> {
    let verdict = if q.passed() { ' ' } else { '!' };
    print_line(format_args!(
        "  {verdict} {:<32} {:>4} tensors  error {:>9.2e}  tolerance {:>9.2e}  worst {}",
        q.name, q.tensors, q.error, q.tolerance, q.worst
    ))
}
