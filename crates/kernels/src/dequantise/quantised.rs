use super::{Float8, FourBit, FourBitFormat, Ggml, Grouped, Int8};
use crate::{Device, Error, Result, View, ViewMut};

/// A matrix `[rows, cols]` of codes in one of the formats.
#[derive(Debug)]
pub enum Quantised {
    /// nf4 or fp4.
    FourBit(FourBit),
    /// `LLM.int8()`.
    Int8(Int8),
    /// 8-bit floats.
    Float8(Float8),
    /// GPTQ or AWQ.
    Grouped(Grouped),
    /// Blocks of GGUF.
    Ggml(Ggml),
}

impl Quantised {
    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::FourBit(codes) => codes.shape(),
            Self::Int8(codes) => codes.shape(),
            Self::Float8(codes) => codes.shape(),
            Self::Grouped(codes) => codes.shape(),
            Self::Ggml(codes) => codes.shape(),
        }
    }

    /// Bits of a code.
    #[must_use]
    pub fn bits(&self) -> usize {
        match self {
            Self::FourBit(_) => 4,
            Self::Int8(_) | Self::Float8(_) => 8,
            Self::Grouped(codes) => codes.bits(),
            Self::Ggml(codes) => codes.kind().bits(),
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
            Self::Float8(codes) => Self::Float8(codes.to_device(device)),
            Self::Grouped(codes) => Self::Grouped(codes.to_device(device)),
            Self::Ggml(codes) => Self::Ggml(codes.to_device(device)),
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
            Self::Float8(codes) => codes.dequantise(out),
            Self::Grouped(codes) => codes.dequantise(out),
            Self::Ggml(codes) => codes.dequantise(out),
        }
    }

    /// `values` in the same format, where `self` is.
    ///
    /// # Errors
    /// If a value is not finite, or the format is one that is read and not made.
    pub fn requantise(&self, values: View<'_>) -> Result<Self> {
        Ok(match self {
            Self::FourBit(codes) => Self::FourBit(codes.requantise(values)?),
            Self::Int8(codes) => Self::Int8(codes.requantise(values)?),
            Self::Float8(codes) => Self::Float8(codes.requantise(values)?),
            Self::Grouped(_) | Self::Ggml(_) => {
                return Err(Error::Invalid {
                    op: "dequantise::Quantised::requantise",
                    message: "the format of this checkpoint (GPTQ, AWQ or GGUF) is read and not made: what changes \
                              the base's weights needs another base"
                        .into(),
                });
            }
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
    /// 8-bit floats with a scale per row.
    Float8,
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
            Self::Float8 => Quantised::Float8(Float8::quantise(values)?),
        })
    }

    /// Bytes that a matrix takes.
    #[must_use]
    pub fn bytes(&self, [rows, cols]: [usize; 2]) -> usize {
        match self {
            Self::FourBit(format) => format.bytes(rows * cols),
            Self::Int8 { .. } => rows * cols + rows * size_of::<f32>(),
            Self::Float8 => Float8::bytes([rows, cols], [1, cols.max(1)]),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::FourBit(format) => format.quant_type.as_str(),
            Self::Int8 { .. } => "int8",
            Self::Float8 => "fp8",
        }
    }
}
