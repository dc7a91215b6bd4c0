//! Tensor-level operations of ferrotune, forward and backward.
//!
//! A [`Tensor`] is a matrix with a dtype and a row pitch; operations take [`View`]s of it. Each
//! operation is one folder: `mod.rs` says what it computes (formula, shapes, checks), `cpu.rs` how,
//! `tests.rs` that it is right. Statistics and accumulators are f32 or wider, data is f32 or bf16,
//! and zero rows (`T = 0`) are legal everywhere.
//!
//! This crate knows no model, no config and no rank.

#![warn(clippy::print_stdout)]

pub mod activation;
pub mod adamw;
mod allocator;
pub mod attention;
pub mod augmented_linear;
pub mod axpby;
pub mod bias;
pub mod block_diagonal;
mod candle;
pub mod circulant;
mod copy;
// Its launchers come with the operations' kernels.
#[allow(dead_code, unused_imports)]
pub mod cuda;
pub mod decompose;
pub mod dequantise;
mod device;
pub mod directions;
pub mod dora;
pub mod dropout;
pub mod embedding;
mod error;
#[cfg(test)]
mod golden_ops;
pub mod hadamard;
#[doc(hidden)]
pub mod host_cuda;
pub mod identity_distance;
pub mod int8_linear;
pub mod khatri_rao;
pub mod kronecker;
mod lanes;
pub mod layer_norm;
pub mod linear_cross_entropy;
pub mod lora_linear;
pub mod matmul;
pub mod noise;
pub mod norm_product;
pub mod optimizer;
pub mod pair_rotation;
pub mod parts;
pub mod qk_norm;
pub mod rms_norm;
pub mod rng;
pub mod rope;
pub mod rotation;
mod row_blocks;
mod simd;
mod tensor;
#[cfg(test)]
mod test_support;
#[cfg(test)]
mod twins;
pub mod vector_bank;
mod workspace;

pub use allocator::ExitWhenExhausted;
pub use device::Device;
pub use error::{Error, ErrorKind, Result};
pub use tensor::{
    Buffer, DType, DeviceBuffer, DeviceSlice, Element, IndexBlock, Indices, Rows, RowsMut, Slice,
    SliceMut, Tensor, View, ViewMut,
};
pub use workspace::Workspace;
