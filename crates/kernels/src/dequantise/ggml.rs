use super::cpu;
use super::cuda::Blocks;
use super::stored::Stored;
use crate::error::{check_len, check_shape};
use crate::tensor::with_dtype;
use crate::{Device, Error, Result, ViewMut};
use half::f16;

/// What blocks of a [`Ggml`] matrix are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    /// 32 weights of 4 bits over one scale.
    Q4_0,
    /// 32 weights of 8 bits over one scale.
    Q8_0,
    /// 256 weights of 4 bits, a scale and a minimum of 6 bits for each 32.
    Q4K,
    /// 256 weights of 6 bits, a scale of 8 bits for each 16.
    Q6K,
}

impl GgmlType {
    /// Weights of a block.
    #[must_use]
    pub fn weights(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Bits of a code.
    #[must_use]
    pub fn bits(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4K => 4,
            Self::Q8_0 => 8,
            Self::Q6K => 6,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_K",
            Self::Q6K => "q6_K",
        }
    }

    /// Bytes that `weights` take, whole blocks of them.
    #[must_use]
    pub fn bytes(self, weights: usize) -> usize {
        weights / self.weights() * self.block_bytes()
    }

    /// Weight `i` of `block`, as llama.cpp computes it.
    fn value(self, block: &[u8], i: usize) -> f32 {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let nibble = |byte: u8, high: bool| if high { byte >> 4 } else { byte & 15 };
        match self {
            Self::Q4_0 => {
                let code = nibble(block[2 + i % 16], i >= 16);
                (f32::from(code) - 8.0) * half(0)
            }
            Self::Q8_0 => f32::from(block[2 + i].cast_signed()) * half(0),
            Self::Q4K => {
                let scales = &block[4..16];
                let j = i / 32;
                let (scale, minimum) = if j < 4 {
                    (scales[j] & 63, scales[j + 4] & 63)
                } else {
                    (
                        scales[j + 4] & 15 | scales[j - 4] >> 6 << 4,
                        scales[j + 4] >> 4 | scales[j] >> 6 << 4,
                    )
                };
                let code = nibble(block[16 + i / 64 * 32 + i % 32], i % 64 >= 32);
                half(0) * f32::from(scale) * f32::from(code) - half(2) * f32::from(minimum)
            }
            Self::Q6K => {
                // Halves of 128 weights, of four runs of 32 that share bytes.
                let (part, run, l) = (i / 128, i % 128 / 32, i % 32);
                let low = nibble(block[part * 64 + run % 2 * 32 + l], run >= 2);
                let high = block[128 + part * 32 + l] >> (2 * run) & 3;
                let scale = block[192 + part * 8 + run * 2 + l / 16].cast_signed();
                let code = i16::from(low | high << 4) - 32;
                half(208) * f32::from(scale) * f32::from(code)
            }
        }
    }
}

/// A matrix `[rows, cols]` of blocks as GGUF files have them, whole blocks in a row.
#[derive(Debug)]
pub struct Ggml {
    shape: [usize; 2],
    kind: GgmlType,
    stored: Stored<Vec<u8>, 1>,
}

impl Ggml {
    /// Takes over `blocks`, row by row.
    ///
    /// # Errors
    /// If rows are not made of whole blocks, or the length does not fit.
    pub fn new(shape: [usize; 2], kind: GgmlType, blocks: Vec<u8>) -> Result<Self> {
        const OP: &str = "dequantise::Ggml::new";
        if !shape[1].is_multiple_of(kind.weights()) {
            let message = format!(
                "{} columns in blocks of {} ({})",
                shape[1],
                kind.weights(),
                kind.name()
            );
            return Err(Error::Invalid { op: OP, message });
        }
        check_len(OP, "blocks", kind.bytes(shape[0] * shape[1]), blocks.len())?;
        let stored = Stored::Host(blocks);
        Ok(Self {
            shape,
            kind,
            stored,
        })
    }

    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// What its blocks are made of.
    #[must_use]
    pub fn kind(&self) -> GgmlType {
        self.kind
    }

    /// Moves the matrix from host memory to that of a GPU; one on a GPU stays where it is.
    ///
    /// A GPU that is out of memory says so with its next operation.
    #[must_use]
    pub fn to_device(self, device: &Device) -> Self {
        let stored = self.stored.moved_to(device, |blocks| [blocks.as_slice()]);
        Self { stored, ..self }
    }

    /// Writes the values to `out [rows, cols]`, f32 or bf16, in the same memory.
    ///
    /// # Errors
    /// If the shapes differ, or the devices; the first failure of the GPU.
    pub fn dequantise(&self, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "dequantise::Ggml::dequantise";
        check_shape(OP, "out", self.shape, out.shape())?;
        self.stored.check(OP, &out)?;
        let (kind, cols) = (self.kind, self.shape[1]);
        let blocks = match &self.stored {
            Stored::Host(blocks) => blocks,
            Stored::Cuda(memory, [blocks]) => {
                let sizes = [
                    kind as u32,
                    kind.weights() as u32,
                    kind.block_bytes() as u32,
                ];
                return Blocks::new([*blocks, 0, 0, 0], sizes).launch(memory.device(), "ggml", out);
            }
        };
        let (weights, bytes) = (kind.weights(), kind.block_bytes());
        with_dtype!(out.dtype(), T => cpu::each_element::<T>(out, |row, column| {
            let at = row * cols + column;
            kind.value(&blocks[at / weights * bytes..][..bytes], at % weights)
        }));
        Ok(())
    }
}
