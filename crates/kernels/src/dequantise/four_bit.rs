use super::quantise::{self, NearestCode};
use super::{NESTED_BLOCK, cpu, cuda, dynamic_map};
use crate::cuda::CudaDevice;
use crate::device::common;
use crate::error::{check_len, check_shape};
use crate::{Device, Error, Result, View, ViewMut};
use std::sync::Arc;

/// Scales of the blocks of a [`FourBit`] matrix: the largest magnitude in each.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// One value per block.
    F32(Vec<f32>),
    /// Quantised themselves ("double quantisation").
    Nested {
        /// One index into `map` per block.
        indices: Vec<u8>,
        /// What an index stands for, relative to its nested block: [`dynamic_map`].
        map: Box<[f32; 256]>,
        /// One value per [`NESTED_BLOCK`] indices.
        nested: Vec<f32>,
        /// Added to every value.
        offset: f32,
    },
}

impl Absmax {
    /// Number of blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Nested { indices, .. } => indices.len(),
        }
    }

    /// Whether there are no blocks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The scale of every block.
    #[must_use]
    pub fn values(&self) -> Vec<f32> {
        match self {
            Self::F32(values) => values.clone(),
            Self::Nested {
                indices,
                map,
                nested,
                offset,
            } => {
                let nested = nested.iter().flat_map(|&n| [n; NESTED_BLOCK]);
                let values = indices.iter().zip(nested);
                values
                    .map(|(&i, nested)| map[usize::from(i)] * nested + offset)
                    .collect()
            }
        }
    }
}

/// A matrix `[rows, cols]` of 4-bit codes, in blocks with a scale each, in the memory of the host or
/// of a GPU.
#[derive(Debug)]
pub struct FourBit {
    shape: [usize; 2],
    block: usize,
    code: [f32; 16],
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Host(Packed),
    Cuda(cuda::FourBitMemory),
}

/// Codes and scales in host memory.
#[derive(Debug, PartialEq)]
pub(super) struct Packed {
    /// Two codes per byte, the first in the high half.
    pub(super) codes: Vec<u8>,
    pub(super) absmax: Absmax,
}

impl FourBit {
    /// Takes over `packed`, two codes per byte, the first in the high half, and the scales of blocks
    /// of `block` codes. `code` is what the codes stand for, [`super::NF4`] or [`super::FP4`].
    ///
    /// # Errors
    /// If `block` is not a power of two from 32 to 4096, or a length does not fit.
    pub fn new(
        shape: [usize; 2],
        block: usize,
        code: [f32; 16],
        packed: Vec<u8>,
        absmax: Absmax,
    ) -> Result<Self> {
        const OP: &str = "dequantise::FourBit::new";
        check_block(OP, block)?;
        let len = shape[0] * shape[1];
        check_len(OP, "packed", len.div_ceil(2), packed.len())?;
        check_len(OP, "absmax", len.div_ceil(block), absmax.len())?;
        if let Absmax::Nested {
            indices, nested, ..
        } = &absmax
        {
            let expected = indices.len().div_ceil(NESTED_BLOCK);
            check_len(OP, "nested absmax", expected, nested.len())?;
        }
        let codes = packed;
        Ok(Self {
            shape,
            block,
            code,
            storage: Storage::Host(Packed { codes, absmax }),
        })
    }

    /// Quantises `values` to the nearest codes; with `nested`, the scales too.
    ///
    /// # Errors
    /// If `block` is not a power of two from 32 to 4096, or a value is not finite.
    pub fn quantise(values: View<'_>, block: usize, code: [f32; 16], nested: bool) -> Result<Self> {
        const OP: &str = "dequantise::FourBit::quantise";
        check_block(OP, block)?;
        let flat = values.to_f32_vec();
        quantise::check_finite(OP, &flat)?;
        let (packed, absmax) = quantise::four_bit(&flat, block, &NearestCode::new(&code));
        let absmax = if nested {
            nested_absmax(&absmax)
        } else {
            Absmax::F32(absmax)
        };
        Self::new(values.shape(), block, code, packed, absmax)
    }

    /// `values` in the same codes and blocks, where `self` is.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn requantise(&self, values: View<'_>) -> Result<Self> {
        let (nested, device) = match &self.storage {
            Storage::Host(packed) => (matches!(packed.absmax, Absmax::Nested { .. }), Device::Cpu),
            Storage::Cuda(memory) => (memory.nested(), Device::Cuda(memory.device().clone())),
        };
        let codes = Self::quantise(values, self.block, self.code, nested)?;
        Ok(codes.to_device(&device))
    }

    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Codes per scale.
    #[must_use]
    pub fn block(&self) -> usize {
        self.block
    }

    /// What the codes stand for.
    #[must_use]
    pub fn code(&self) -> &[f32; 16] {
        &self.code
    }

    /// Moves the matrix from host memory to that of a GPU; one on a GPU stays where it is.
    ///
    /// A GPU that is out of memory says so with its next operation.
    #[must_use]
    pub fn to_device(mut self, device: &Device) -> Self {
        if let (Storage::Host(packed), Device::Cuda(device)) = (&self.storage, device) {
            let memory = cuda::FourBitMemory::new(device, packed, &self.code);
            self.storage = Storage::Cuda(memory);
        }
        self
    }

    /// Writes the values to `out [rows, cols]`, f32 or bf16, in the same memory.
    ///
    /// # Errors
    /// If the shapes differ, or the devices; the first failure of the GPU.
    pub fn dequantise(&self, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "dequantise::FourBit::dequantise";
        check_shape(OP, "out", self.shape, out.shape())?;
        common(OP, &[self.device(), out.device()])?;
        match &self.storage {
            Storage::Host(packed) => {
                cpu::four_bit(packed, self.block, &self.code, out);
                Ok(())
            }
            Storage::Cuda(memory) => cuda::four_bit(memory, self.block, out),
        }
    }

    fn device(&self) -> Option<&Arc<CudaDevice>> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Cuda(memory) => Some(memory.device()),
        }
    }

    /// Two codes per byte, the first in the high half, and the scales, if the host holds them.
    #[must_use]
    pub fn parts(&self) -> Option<(&[u8], &Absmax)> {
        match &self.storage {
            Storage::Host(packed) => Some((&packed.codes, &packed.absmax)),
            Storage::Cuda(_) => None,
        }
    }
}

/// Quantises scales to indices into the dynamic map, after taking off their mean.
fn nested_absmax(absmax: &[f32]) -> Absmax {
    let sum: f64 = absmax.iter().copied().map(f64::from).sum();
    let offset = (sum / absmax.len().max(1) as f64) as f32;
    let centred: Vec<f32> = absmax.iter().map(|value| value - offset).collect();
    let map = Box::new(dynamic_map(true));
    let (indices, nested) =
        quantise::blockwise(&centred, NESTED_BLOCK, &NearestCode::new(&*map), 0);
    Absmax::Nested {
        indices,
        map,
        nested,
        offset,
    }
}

fn check_block(op: &'static str, block: usize) -> Result<()> {
    if block.is_power_of_two() && (32..=4096).contains(&block) {
        return Ok(());
    }
    let message = format!("blocks of {block}; expected a power of two from 32 to 4096");
    Err(Error::Invalid { op, message })
}
