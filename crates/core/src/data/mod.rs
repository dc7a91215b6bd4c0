//! From files to micro-batches.

mod batch;
mod chat_template;
#[cfg(test)]
mod fixtures;
pub mod jsonl;
mod pack;
mod record;
mod tokenizer;

pub use batch::{Example, IGNORE_INDEX, PackedBatch};
pub use chat_template::{ChatTemplate, Conversation, DEFAULT_DATE, Ending, Rendered};
pub use pack::{pack_bfd, split_long};
pub use record::{Message, Record, RecordKind, TemplateInputs};
pub use tokenizer::{Decoding, Encoded, SpecialTokens, Tokenizer};
