use super::{cpu, cuda, quantise};
use crate::cuda::CudaDevice;
use crate::device::common;
use crate::error::{check_len, check_shape};
use crate::{Device, Result, View, ViewMut};
use std::sync::Arc;

/// A matrix `[rows, cols]` of signed bytes with a scale per row (`LLM.int8()` weights), in the memory
/// of the host or of a GPU.
#[derive(Debug)]
pub struct Int8 {
    shape: [usize; 2],
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Host(Scaled),
    Cuda(cuda::Int8Memory),
}

/// Bytes and scales in host memory.
#[derive(Debug, PartialEq)]
pub(super) struct Scaled {
    pub(super) values: Vec<i8>,
    pub(super) absmax: Vec<f32>,
}

impl Int8 {
    /// Takes over `values [rows * cols]`, row by row, and the largest magnitude of every row, which
    /// 127 stands for (`SCB` in a checkpoint).
    ///
    /// # Errors
    /// If a length does not fit.
    pub fn new(shape: [usize; 2], values: Vec<i8>, absmax: Vec<f32>) -> Result<Self> {
        const OP: &str = "dequantise::Int8::new";
        check_len(OP, "values", shape[0] * shape[1], values.len())?;
        check_len(OP, "absmax", shape[0], absmax.len())?;
        Ok(Self {
            shape,
            storage: Storage::Host(Scaled { values, absmax }),
        })
    }

    /// Quantises `values`, rounded to f16 first as bitsandbytes does.
    ///
    /// # Errors
    /// If a value is not finite as f16.
    pub fn quantise(values: View<'_>) -> Result<Self> {
        const OP: &str = "dequantise::Int8::quantise";
        let [rows, cols] = values.shape();
        let mut flat = values.to_f32_vec();
        for value in &mut flat {
            *value = half::f16::from_f32(*value).to_f32();
        }
        quantise::check_finite(OP, &flat)?;
        let (values, absmax) = quantise::rowwise(&flat, [rows, cols]);
        Self::new([rows, cols], values, absmax)
    }

    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Moves the matrix from host memory to that of a GPU; one on a GPU stays where it is.
    ///
    /// A GPU that is out of memory says so with its next operation.
    #[must_use]
    pub fn to_device(mut self, device: &Device) -> Self {
        if let (Storage::Host(scaled), Device::Cuda(device)) = (&self.storage, device) {
            self.storage = Storage::Cuda(cuda::Int8Memory::new(device, scaled));
        }
        self
    }

    /// Writes the values to `out [rows, cols]`, f32 or bf16, in the same memory.
    ///
    /// # Errors
    /// If the shapes differ, or the devices; the first failure of the GPU.
    pub fn dequantise(&self, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "dequantise::Int8::dequantise";
        check_shape(OP, "out", self.shape, out.shape())?;
        common(OP, &[self.device(), out.device()])?;
        match &self.storage {
            Storage::Host(scaled) => {
                cpu::int8(scaled, out);
                Ok(())
            }
            Storage::Cuda(memory) => cuda::int8(memory, out),
        }
    }

    fn device(&self) -> Option<&Arc<CudaDevice>> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Cuda(memory) => Some(memory.device()),
        }
    }

    /// Bytes and scales, if the host holds them.
    #[cfg(test)]
    pub(super) fn scaled(&self) -> Option<&Scaled> {
        match &self.storage {
            Storage::Host(scaled) => Some(scaled),
            Storage::Cuda(_) => None,
        }
    }
}
