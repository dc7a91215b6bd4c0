//! `ferrotune parity CASE_DIR...`: recompute what other software recorded, and compare.
//!
//! A case is a folder with a `case.json` whose `kind` says what it holds; see
//! `tests/fixtures/golden`. The error of a tensor is `max|ours - theirs| / max|theirs|`.

mod adapted;
mod adapter;
mod allocation;
mod arch;
mod case;
mod combined;
mod compare;
mod complete;
mod cpu_kernel;
mod initialised;
mod optimizers;
mod padded;
mod primitives;
mod prompt;
mod quantised;
mod schedule;
mod sft;
mod trajectory;

pub use case::Case;
pub use compare::{Comparison, Quantity};

use ferrotune_core::{Error, Result};
use ferrotune_kernels::Device;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What comparing one case showed.
#[derive(Debug, Serialize)]
pub struct CaseReport {
    /// The case's folder.
    pub case: PathBuf,
    /// `kind` of its case.json.
    pub kind: String,
    /// Whether every quantity is within its tolerance.
    pub passed: bool,
    /// Worst error per quantity.
    pub quantities: Vec<Quantity>,
    /// Why it could not be compared at all.
    pub error: Option<String>,
}

/// Runs one case on `device`.
#[must_use]
pub fn run(directory: &Path, device: &Device) -> CaseReport {
    let (kind, result) = match Case::open(directory, device) {
        Ok(case) => (case.kind.clone(), compare_case(&case)),
        Err(error) => (String::new(), Err(error)),
    };
    let case = directory.to_path_buf();
    match result {
        Ok(comparison) => {
            let quantities = comparison.finish();
            let passed = !quantities.is_empty() && quantities.iter().all(Quantity::passed);
            CaseReport {
                case,
                kind,
                passed,
                quantities,
                error: None,
            }
        }
        Err(error) => CaseReport {
            case,
            kind,
            passed: false,
            quantities: Vec::new(),
            error: Some(error.to_string()),
        },
    }
}

fn compare_case(case: &Case) -> Result<Comparison> {
    match case.kind.as_str() {
        "causal_lm" => arch::compare(case),
        "base of the quant cases" => arch::compare_base(case),
        "adapter" => adapter::compare(case),
        "adapter base" => adapter::compare_base(case),
        "adalora allocation" => allocation::compare(case),
        "multi-adapter" => combined::compare(case),
        "training trajectory" => trajectory::compare(case),
        "lr schedules" => schedule::compare(case),
        "HF bitsandbytes checkpoint" => quantised::compare(case),
        "bitsandbytes primitives on CPU" => primitives::compare(case),
        "optimizers on fixed gradients" => optimizers::compare(case),
        "bitsandbytes 8-bit optimizers on CPU" => optimizers::compare_eight_bit(case),
        "tokenizer" => sft::tokenizer(case),
        "chat templates" => sft::templates(case),
        "packing" => sft::packing(case),
        "SFT preprocessing" => sft::prepare(case),
        other => Err(Error::config(
            "kind",
            format!(
                "{}: `{other}` is not a kind of case known here; known: causal_lm, base of the quant cases, adapter, adapter base, adalora allocation, multi-adapter, \
                 training trajectory, lr schedules, HF bitsandbytes checkpoint, bitsandbytes primitives on CPU, \
                 optimizers on fixed gradients, bitsandbytes 8-bit optimizers on CPU, tokenizer, chat templates, packing, SFT preprocessing",
                case.directory.join("case.json").display()
            ),
        )),
    }
}
