//! PEFT methods: configuration, matching, file format, merge.
//!
//! [`PeftConfig`] is the registry: one variant per method, chosen by `peft_type` in
//! `adapter_config.json`. Each method is one folder that implements
//! [`Adapter`](ferrotune_core::adapter::Adapter); [`target`] decides where all of them attach.
//! Adding a method is a folder, its `mod` line and its variant.
//!
//! Files are PEFT's: what is written here loads there, and the other way round, strictly. Nothing
//! is executed on loading: pickles are refused.

#![forbid(unsafe_code)]

pub mod lora;
pub mod merge;
mod registry;
pub mod target;
#[cfg(test)]
mod testing;

pub use lora::{InitLoraWeights, LoraAdapter, LoraConfig};
pub use merge::{MergeDType, MergeOptions, MergeReport, MergedTensor, OutputDirectory, merge};
pub use registry::{PeftConfig, load};
pub use target::{ExcludeModules, TargetModules};
