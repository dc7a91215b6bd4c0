//! One optimizer step, and the run around it.

mod algorithms;
mod gradients;
mod graphs;
mod optimizer;
mod ranks;
mod rehearsal;
mod run;
mod step;
mod together;

pub use crate::run_log::StepReport;
pub use optimizer::StateTensors;
pub use run::{Run, RunOutcome, RunPlan, Save, StepData};
pub use step::{EvalReport, Trainer, TrainerOptions, attach};
