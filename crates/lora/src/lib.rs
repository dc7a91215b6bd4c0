//! PEFT methods: configuration, matching, file format, merge.
//!
//! [`PeftConfig`] is the registry: one variant per method, chosen by `peft_type` in
//! `adapter_config.json`. Each method is one folder that implements
//! [`Adapter`](ferrotune_core::adapter::Adapter); [`target`] decides where all of them attach.
//! Adding a method is a folder, its `mod` line and its variant.
//!
//! Files are PEFT's: what is written here loads there, and the other way round, strictly. Nothing
//! is executed on loading: pickles are refused.
//!
//! ```
//! use ferrotune_core::adapter::{Adapter, Site, SiteId, SiteKind};
//! use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
//! use ferrotune_lora::{LoraAdapter, LoraConfig, TargetModules};
//!
//! // A model lists its sites before it reads a weight; here a model of one linear layer.
//! let site = Site {
//!     id: SiteId(0),
//!     name: "model.layers.0.self_attn.q_proj".into(),
//!     stored_name: "model.layers.0.self_attn.q_proj".into(),
//!     kind: SiteKind::Linear,
//!     in_features: 32,
//!     out_features: 64,
//!     bias: false,
//!     stored_transposed: false,
//!     keys: None,
//!     layer: Some(0),
//!     output_head: false,
//!     tied_to: None,
//!     execution_order: 0,
//! };
//! let config = LoraConfig {
//!     rank: 4,
//!     alpha: 8.0,
//!     target_modules: Some(TargetModules::List(vec!["q_proj".into()])),
//!     ..LoraConfig::default()
//! };
//! let adapter = LoraAdapter::new(config, "llama")?;
//! let mut layout = ParamLayoutBuilder::new();
//! let attachments = adapter.attach(&[site], &mut layout)?;
//! let mut params = FlatBuffer::zeros(&layout.build()?);
//! adapter.init(&mut params, 42)?;
//! assert_eq!(attachments.len(), 1);
//! assert_eq!(params.layout().trainable(), 4 * 32 + 64 * 4);
//! # Ok::<(), ferrotune_core::Error>(())
//! ```

#![forbid(unsafe_code)]
#![warn(clippy::print_stdout)]

mod base_copies;
mod beside;
mod combine;
mod files;
mod fit;
pub mod inspect;
pub mod lora;
mod lora_fa;
mod lora_plus;
pub mod merge;
mod method;
mod methods;
mod modules;
mod names;
mod over;
mod parts;
mod prompt;
mod registry;
pub mod target;
#[cfg(test)]
mod testing;
mod unknown_key;

pub use base_copies::AdapterBase;
pub use combine::{
    Arithmetic, Combination, CombineOptions, CombineReport, CombinedModule, MajoritySign, combine,
};
pub use fit::{GivenRank, require_rank};
pub use lora::{
    CordaMethod, Direction, EvaConfig, InitLoraWeights, LoftqConfig, LoraAdapter, LoraBias,
    LoraConfig, LoraGaConfig, Observation, Scale, Start, TokenIndices,
};
pub use lora_fa::LoraFa;
pub use lora_plus::LoraPlus;
pub use merge::{MergeDType, MergeOptions, MergeReport, MergedTensor, OutputDirectory, merge};
pub use parts::{PartsAdapter, PartsConfig};
pub use registry::{OtherConfig, PeftConfig, classes_of, load, load_as_peft};
pub use target::{ExcludeModules, TargetModules};
