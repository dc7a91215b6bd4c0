//! From files to micro-batches.

mod batch;

pub use batch::{Example, IGNORE_INDEX, PackedBatch};
