//! From files to micro-batches.

mod batch;
mod chat_template;
mod dataset;
#[cfg(test)]
mod fixtures;
pub mod jsonl;
mod pack;
mod padding;
mod prepare;
mod prompt;
mod record;
mod sampler;
mod tokenizer;

pub use batch::{BatchSize, Example, IGNORE_INDEX, PackedBatch};
pub use chat_template::{ChatTemplate, Conversation, DEFAULT_DATE, Ending, Rendered};
pub use dataset::Dataset;
pub use pack::{pack_bfd, split_long};
pub use padding::padded_rows;
pub use prepare::{PrepareOptions, PrepareReport, Preparer, Row, TruncationMode};
pub use prompt::Prompt;
pub use record::{Message, Record, RecordKind, TemplateInputs};
pub use sampler::{BatchPlan, EpochPlan, MicroBatch, Order};
pub use tokenizer::{Decoding, Encoded, SpecialTokens, Tokenizer};
