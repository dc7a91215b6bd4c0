//! From files to micro-batches.

mod assistant;
mod batch;
mod chat_template;
mod classes;
mod columns;
mod compressed;
mod dataset;
mod examples;
#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod hostile;
pub mod jsonl;
mod pack;
mod padding;
mod parquet;
mod prepare;
mod prepared_file;
mod prompt;
mod record;
mod roles;
mod sampler;
mod source;
mod tokenizer;

pub use assistant::mask_of_spans;
pub use batch::{BatchSize, Example, IGNORE_INDEX, PackedBatch};
pub use chat_template::{ChatTemplate, Conversation, DEFAULT_DATE, Ending, Rendered};
pub use classes::Classes;
pub use dataset::Dataset;
pub use examples::Examples;
pub use pack::pack_bfd;
pub use padding::padded_rows;
pub use prepare::{BadRows, PrepareOptions, PrepareReport, Preparer, Row, TruncationMode};
pub use prompt::Prompt;
pub use record::{Message, Record, RecordKind, TemplateInputs, TrainedTurns, rename_columns};
pub use sampler::{BatchPlan, EpochPlan, MicroBatch, Order};
pub use source::read_columns;
pub use tokenizer::{Decoding, Encoded, SpecialTokens, Tokenizer};
