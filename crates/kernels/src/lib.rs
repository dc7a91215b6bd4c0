//! Tensor-level operations of ferrotune, forward and backward.
//!
//! A [`Tensor`] is a matrix with a dtype and a row pitch; operations take [`View`]s of it. Each
//! operation is one folder: `mod.rs` says what it computes (formula, shapes, checks), `cpu.rs` how,
//! `tests.rs` that it is right. Statistics and accumulators are f32 or wider, data is f32 or bf16,
//! and zero rows (`T = 0`) are legal everywhere.
//!
//! This crate knows no model, no config and no rank.

#![warn(clippy::print_stdout)]

pub mod adamw;
pub mod attention;
pub mod bias;
mod candle;
pub mod dropout;
pub mod embedding;
mod error;
mod lanes;
pub mod linear_cross_entropy;
pub mod lora_linear;
pub mod matmul;
pub mod rms_norm;
pub mod rng;
pub mod rope;
mod row_blocks;
mod simd;
pub mod swiglu;
mod tensor;
#[cfg(test)]
mod test_support;
mod workspace;

pub use error::{Error, Result};
pub use tensor::{Buffer, DType, Element, Rows, RowsMut, Slice, SliceMut, Tensor, View, ViewMut};
pub use workspace::Workspace;
