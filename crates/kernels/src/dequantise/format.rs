use super::{FP4, FourBit, NESTED_BLOCK, NF4};
use crate::{Result, View};

/// A 4-bit format, as bitsandbytes names its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FourBitFormat {
    /// What the codes stand for.
    pub quant_type: FourBitType,
    /// Weights that share a scale: a power of two from 32 to 4096.
    pub block: usize,
    /// Whether the scales are quantised too, to 8 bits.
    pub double_quant: bool,
}

/// What 4-bit codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitType {
    /// Quantiles of a normal distribution, [`NF4`].
    Nf4,
    /// Small floats, [`FP4`].
    Fp4,
}

impl FourBitType {
    /// The name in configurations and checkpoints.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The values of the codes.
    #[must_use]
    pub fn code(self) -> [f32; 16] {
        match self {
            Self::Nf4 => NF4,
            Self::Fp4 => FP4,
        }
    }
}

impl FourBitFormat {
    /// Weights per scale unless something else is asked for, as in bitsandbytes.
    pub const BLOCK: usize = 64;

    /// The nearest codes of `values [rows, cols]`, in host memory.
    ///
    /// # Errors
    /// If `block` is not a power of two from 32 to 4096, or a value is not finite.
    pub fn quantise(&self, values: View<'_>) -> Result<FourBit> {
        let code = self.quant_type.code();
        FourBit::quantise(values, self.block, code, self.double_quant)
    }

    /// Bytes that codes and scales of `len` weights take.
    #[must_use]
    pub fn bytes(&self, len: usize) -> usize {
        let (codes, blocks) = (len.div_ceil(2), len.div_ceil(self.block));
        let table = size_of::<[f32; 16]>();
        if self.double_quant {
            let nested = blocks.div_ceil(NESTED_BLOCK) * size_of::<f32>();
            codes + table + blocks + nested + size_of::<[f32; 256]>()
        } else {
            codes + table + blocks * size_of::<f32>()
        }
    }
}
