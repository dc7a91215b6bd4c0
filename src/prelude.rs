//! What most embedders need, in one import: `use ferrotune::prelude::*;`.

pub use crate::generate::GenerateOptions;
pub use crate::recipe::{Recipe, Summary};
pub use crate::text_model::TextModel;
pub use ferrotune_core::config::{Names, TrainConfig};
pub use ferrotune_core::data::{Dataset, Example, Message, PackedBatch, Prompt, Record, Tokenizer};
pub use ferrotune_core::io::ModelFiles;
pub use ferrotune_core::lr_schedule::LrSchedule;
pub use ferrotune_core::model::DecoderConfig;
pub use ferrotune_core::process_group::Solo;
pub use ferrotune_core::trainer::{RunOutcome, StepReport, Trainer, TrainerOptions};
pub use ferrotune_core::{Error, ExitCode, Result};
pub use ferrotune_lora::{LoraAdapter, LoraConfig, TargetModules};
