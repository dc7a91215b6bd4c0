//! ferrotune: a GPU fine-tuning engine. LoRA and PEFT over frozen base weights.
//!
//! The crates behind this one, from the bottom: [`kernels`] (tensor operations, forward and
//! backward), [`core`] (models, data, loss, trainer, checkpoints), [`lora`] (PEFT methods and their
//! files), [`dist`] (ranks). This crate wires them: [`parity`] and [`generate`] are here.

pub use ferrotune_core as core;
pub use ferrotune_dist as dist;
pub use ferrotune_kernels as kernels;
pub use ferrotune_lora as lora;

pub mod generate;
pub mod parity;
pub mod recipe;
