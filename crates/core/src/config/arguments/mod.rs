//! The keys, section by section.

mod data;
mod lora;
mod model;
mod optimizer;
mod output;
mod runtime;
mod schedule;

pub use data::{BadRows, DataArguments, PackingStrategy, SamplingStrategy, TruncationMode};
pub(super) use lora::SEQUENCE_CLASSIFICATION;
pub use lora::{InitLoraWeights, LoraArguments, LoraBias, TokenIndices};
pub use model::{Dtype, ModelArguments, QuantType};
pub use optimizer::{Optim, OptimArgs, OptimizerArguments};
pub use output::{IntervalStrategy, OutputArguments, Resume};
pub use runtime::{CudaGraph, DdpBackend, Device, GemmTuning, RuntimeArguments};
pub use schedule::ScheduleArguments;

/// Where a default comes from.
pub(super) mod source {
    pub(in crate::config) const TRANSFORMERS: &str = "Transformers 5.23 TrainingArguments";
    pub(in crate::config) const TRL_MODEL: &str = "TRL 1.16 ModelConfig";
    pub(in crate::config) const TRL_SCRIPT: &str = "TRL 1.16 ScriptArguments";
    pub(in crate::config) const TRL_SFT: &str = "TRL 1.16 SFTConfig";
    pub(in crate::config) const PEFT: &str = "PEFT 0.21 LoraConfig";
    pub(in crate::config) const OURS: &str = "ferrotune";
}
