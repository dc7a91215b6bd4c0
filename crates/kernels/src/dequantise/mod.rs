//! Quantised matrices, and the values they stand for: the formats of bitsandbytes, 8-bit floats ([`Float8`]), whole
//! numbers in groups as GPTQ and AWQ have them ([`Grouped`]), and the blocks of GGUF ([`Ggml`]).
//!
//! ```text
//! 4 bits:  w[i] = code[q_i] * absmax[i / block]                     i counts the matrix row by row
//! absmax:  f32 per block, or itself quantised to 8 bits:
//!          absmax[j] = map[a_j] * nested[j / 256] + offset
//! int8:    w[r, c] = q[r, c] * absmax[r] * (1 / 127)
//! ```
//!
//! Every product and sum is an f32 rounding of its own, and a bf16 result one more at the end, so the
//! values are those of bitsandbytes to the last bit. Quantising goes to the nearest code; exactly
//! between two, to the lower one, and to the even one for int8.
//!
//! # Source
//! Dettmers et al.: "QLoRA" (2023) for nf4 and nested statistics, "LLM.int8()" (2022) for int8, in
//! the layout of bitsandbytes 0.50: blocks run over the flattened matrix, of two codes in a byte the
//! first has the high half.

mod blockwise;
mod codes;
mod cpu;
pub(crate) mod cuda;
mod float8;
mod format;
#[cfg(test)]
mod format_tests;
mod four_bit;
mod ggml;
mod grouped;
mod int8;
mod quantise;
mod quantised;
mod stored;
#[cfg(test)]
mod tests;

pub use blockwise::{Blockwise, ByteCodec};
pub use codes::{FP4, NF4, dynamic_map};
pub(crate) use cpu::INVERSE_127;
pub use float8::Float8;
pub use format::{FourBitFormat, FourBitType};
pub use four_bit::{Absmax, FourBit};
pub use ggml::{Ggml, GgmlType};
pub use grouped::Grouped;
pub use int8::Int8;
pub(crate) use int8::Int8Parts;
pub(crate) use quantise::NearestCode;
pub use quantised::{QuantFormat, Quantised};

/// Elements of `absmax` that share one value of the nested statistics.
pub const NESTED_BLOCK: usize = 256;
