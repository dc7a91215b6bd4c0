//! The engine on a GPU, and beside it on a CPU: the GPU that `FERROTUNE_TEST_DEVICE=cuda` asks for, else the
//! stand-in that runs the same kernels on the host. One program, so that `tests/gpu/pack.sh` can carry it to a
//! machine that has neither Rust nor a compiler.

#[path = "../common/mod.rs"]
mod common;

mod activations;
mod binary;
mod decode;
mod method_dropout;
mod offload;
mod optimizers;
mod padding;
mod prompts;
mod quantised;
mod several_adapters;
mod steps;
mod together;
