//! ferrotune: a fine-tuning engine. LoRA and PEFT over frozen base weights.
//!
//! It reads and writes what the Hugging Face ecosystem does: checkpoints in, PEFT adapters out,
//! TRL's names in the configuration. There are two ways in, one above the other.
//!
//! - [`Recipe`](recipe::Recipe) is a whole run from a [`TrainConfig`](core::config::TrainConfig):
//!   data, checkpoints, resumption, log files, model card. It is what `ferrotune train` calls.
//!   [`Recipe::prepare_with_rows`](recipe::Recipe::prepare_with_rows) takes rows from anywhere.
//! - [`Trainer`](core::trainer::Trainer) is one model in training, a step at a time: the loop, the
//!   data and the files are yours.
//!
//! [`TextModel`] loads what came out, one adapter or several over a base, and answers prompts; [`lora::merge()`] folds an adapter into
//! its base. A method of your own implements [`Adapter`](core::adapter::Adapter). The programs in
//! `examples/` show each of these on a few dozen lines.
//!
//! # Example
//!
//! LoRA on a Llama of random weights, with a loop of one's own. For a real model,
//! `DecoderConfig::open(directory)` and `ModelFiles::open(directory)` take the place of the first
//! two statements.
//!
//! ```
//! use ferrotune::core::model::{HfConfig, RandomWeights};
//! use ferrotune::prelude::*;
//! use serde_json::json;
//!
//! let config = DecoderConfig::from_hf(&HfConfig::from_value(
//!     "config.json".as_ref(),
//!     json!({
//!         "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
//!         "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
//!         "rms_norm_eps": 1e-6,
//!     }),
//! )?)?;
//! let base = RandomWeights { seed: 1 };
//!
//! let lora = LoraConfig {
//!     rank: 4,
//!     alpha: 8.0,
//!     target_modules: Some(TargetModules::AllLinear),
//!     ..LoraConfig::default()
//! };
//! let adapter = LoraAdapter::new(lora, &config.model_type)?;
//! let options = TrainerOptions::default();
//! let mut trainer = Trainer::new(&config, &base, Box::new(adapter), Box::new(Solo), options)?;
//!
//! // One document of four tokens; a label of -100 is not trained on.
//! let document = Example { input_ids: vec![1, 2, 3, 4], labels: vec![-100, 2, 3, 4] };
//! let batch = PackedBatch::pack([(0, &document)]);
//! let first = trainer.step(std::slice::from_ref(&batch), 1e-2)?;
//! for _ in 0..30 {
//!     trainer.step(std::slice::from_ref(&batch), 1e-2)?;
//! }
//! assert_eq!(first.trained_tokens, 3);
//! assert!(trainer.evaluate(&[batch])?.loss < first.loss());
//! # Ok::<(), Error>(())
//! ```
//!
//! # The crates behind this one
//!
//! From the bottom: [`kernels`] (tensor operations, forward and backward), [`core`] (models, data,
//! loss, trainer, checkpoints), [`lora`] (PEFT methods and their files), [`dist`] (ranks). This
//! crate wires them, and holds [`recipe`], [`generate`], [`TextModel`] and [`parity`].

#![forbid(unsafe_code)]
#![warn(clippy::print_stdout)]

pub use ferrotune_core as core;
pub use ferrotune_dist as dist;
pub use ferrotune_kernels as kernels;
pub use ferrotune_lora as lora;

pub mod device;
pub mod generate;
pub mod hub;
pub mod parity;
pub mod prelude;
pub mod ranks;
pub mod recipe;
mod text_model;
pub mod threads;

pub use text_model::TextModel;
