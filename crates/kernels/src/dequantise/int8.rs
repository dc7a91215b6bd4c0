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
    threshold: f32,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Host(Scaled),
    Cuda(cuda::Int8Memory),
}

/// Bytes and scales where they lie: slices of the host, or addresses of a GPU.
pub(crate) enum Int8Parts<'a> {
    Host { codes: &'a [i8], absmax: &'a [f32] },
    Cuda { codes: u64, absmax: u64 },
}

/// Bytes and scales in host memory.
#[derive(Debug, PartialEq)]
pub(super) struct Scaled {
    pub(super) values: Vec<i8>,
    pub(super) absmax: Vec<f32>,
}

impl Int8 {
    /// Inputs that stay in floating point unless something else is asked for, as in Transformers.
    pub const THRESHOLD: f32 = 6.0;

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
            threshold: Self::THRESHOLD,
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

    /// The same with another limit of the inputs that stay in floating point in [`crate::int8_linear`];
    /// 0 for none that do.
    #[must_use]
    pub fn with_threshold(self, threshold: f32) -> Self {
        Self { threshold, ..self }
    }

    /// Inputs from this magnitude on stay in floating point; 0 for none.
    #[must_use]
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// `values` in the same format, where `self` is.
    ///
    /// # Errors
    /// If a value is not finite as f16.
    pub fn requantise(&self, values: View<'_>) -> Result<Self> {
        let device = match &self.storage {
            Storage::Host(_) => Device::Cpu,
            Storage::Cuda(memory) => Device::Cuda(memory.device().clone()),
        };
        let codes = Self::quantise(values)?.with_threshold(self.threshold);
        Ok(codes.to_device(&device))
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
        self.write("dequantise::Int8::dequantise", true, out)
    }

    /// Writes the bytes themselves as numbers, -127 to 127, which both dtypes hold exactly.
    ///
    /// # Errors
    /// As [`Int8::dequantise`].
    pub(crate) fn write_codes(&self, out: ViewMut<'_>) -> Result<()> {
        self.write("dequantise::Int8::write_codes", false, out)
    }

    /// What `int8_linear` reads of it.
    pub(crate) fn parts(&self) -> Int8Parts<'_> {
        match &self.storage {
            Storage::Host(scaled) => Int8Parts::Host {
                codes: &scaled.values,
                absmax: &scaled.absmax,
            },
            Storage::Cuda(memory) => Int8Parts::Cuda {
                codes: memory.codes(),
                absmax: memory.absmax(),
            },
        }
    }

    fn write(&self, op: &'static str, scaled: bool, out: ViewMut<'_>) -> Result<()> {
        check_shape(op, "out", self.shape, out.shape())?;
        common(op, &[self.device(), out.device()])?;
        match &self.storage {
            Storage::Host(matrix) => {
                cpu::int8(matrix, scaled, out);
                Ok(())
            }
            Storage::Cuda(memory) => cuda::int8(memory, scaled, out),
        }
    }

    pub(crate) fn device(&self) -> Option<&Arc<CudaDevice>> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Cuda(memory) => Some(memory.device()),
        }
    }

    /// Bytes row by row and the largest magnitude of every row, if the host holds them.
    #[must_use]
    pub fn rows(&self) -> Option<(&[i8], &[f32])> {
        match &self.storage {
            Storage::Host(scaled) => Some((&scaled.values, &scaled.absmax)),
            Storage::Cuda(_) => None,
        }
    }
}
