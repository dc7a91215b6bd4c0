use super::{FourBit, FourBitFormat, Int8};
use crate::{Device, Result, View, ViewMut};

/// A matrix `[rows, cols]` of codes in one of the formats.
#[derive(Debug)]
pub enum Quantised {
    /// nf4 or fp4.
    FourBit(FourBit),
    /// `LLM.int8()`.
    Int8(Int8),
}

impl Quantised {
    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::FourBit(codes) => codes.shape(),
            Self::Int8(codes) => codes.shape(),
        }
    }

    /// Bits of a code.
    #[must_use]
    pub fn bits(&self) -> usize {
        match self {
            Self::FourBit(_) => 4,
            Self::Int8(_) => 8,
        }
    }

    /// Moves the matrix from host memory to that of a GPU; one on a GPU stays where it is.
    ///
    /// A GPU that is out of memory says so with its next operation.
    #[must_use]
    pub fn to_device(self, device: &Device) -> Self {
        match self {
            Self::FourBit(codes) => Self::FourBit(codes.to_device(device)),
            Self::Int8(codes) => Self::Int8(codes.to_device(device)),
        }
    }

    /// Writes the values to `out [rows, cols]`, f32 or bf16, in the same memory.
    ///
    /// # Errors
    /// If the shapes differ, or the devices; the first failure of the GPU.
    pub fn dequantise(&self, out: ViewMut<'_>) -> Result<()> {
        match self {
            Self::FourBit(codes) => codes.dequantise(out),
            Self::Int8(codes) => codes.dequantise(out),
        }
    }

    /// `values` in the same format, where `self` is.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn requantise(&self, values: View<'_>) -> Result<Self> {
        Ok(match self {
            Self::FourBit(codes) => Self::FourBit(codes.requantise(values)?),
            Self::Int8(codes) => Self::Int8(codes.requantise(values)?),
        })
    }
}

/// A format that values can be quantised to as they are read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QuantFormat {
    /// nf4 or fp4.
    FourBit(FourBitFormat),
    /// `LLM.int8()`.
    Int8 {
        /// Inputs from this magnitude on stay in floating point; 0 for none.
        threshold: f32,
    },
}

impl QuantFormat {
    /// Codes of `values [rows, cols]`, in host memory.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn quantise(&self, values: View<'_>) -> Result<Quantised> {
        Ok(match *self {
            Self::FourBit(format) => Quantised::FourBit(format.quantise(values)?),
            Self::Int8 { threshold } => {
                Quantised::Int8(Int8::quantise(values)?.with_threshold(threshold))
            }
        })
    }

    /// Bytes that a matrix takes.
    #[must_use]
    pub fn bytes(&self, [rows, cols]: [usize; 2]) -> usize {
        match self {
            Self::FourBit(format) => format.bytes(rows * cols),
            Self::Int8 { .. } => rows * cols + rows * size_of::<f32>(),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::FourBit(format) => format.quant_type.as_str(),
            Self::Int8 { .. } => "int8",
        }
    }
}
