//! Memory that holds elements: owned or borrowed, of the host or of a GPU.

use super::DType;
use crate::Device;
use crate::cuda::{CudaDevice, Memory};
use half::bf16;
use std::ops::Range;
use std::sync::Arc;

/// Borrowed elements of either dtype.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
    /// Elements in the memory of a GPU.
    Cuda(DeviceSlice<'a>),
}

/// Mutably borrowed elements of either dtype.
#[derive(Debug)]
pub enum SliceMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// bf16 elements.
    Bf16(&'a mut [bf16]),
    /// Elements in the memory of a GPU.
    Cuda(DeviceSlice<'a>),
}

/// A range of elements in the memory of a GPU.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<'a> {
    memory: &'a Memory,
    dtype: DType,
    start: usize,
    len: usize,
}

impl<'a> DeviceSlice<'a> {
    /// Address of the first element.
    pub(crate) fn ptr(&self) -> u64 {
        self.memory.ptr() + (self.start * self.dtype.bytes()) as u64
    }

    /// The GPU.
    pub(crate) fn device(&self) -> &'a Arc<CudaDevice> {
        self.memory.device()
    }

    fn range(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "elements {range:?} of {}",
            self.len
        );
        Self {
            start: self.start + range.start,
            len: range.len(),
            ..self
        }
    }
}

impl<'a> Slice<'a> {
    /// Element type.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
            Self::Cuda(s) => s.dtype,
        }
    }

    /// Some of the elements.
    pub(crate) fn range(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(s) => Self::F32(&s[range]),
            Self::Bf16(s) => Self::Bf16(&s[range]),
            Self::Cuda(s) => Self::Cuda(s.range(range)),
        }
    }

    /// The elements, if a GPU holds them.
    pub(crate) fn cuda(&self) -> Option<DeviceSlice<'a>> {
        match self {
            Self::Cuda(s) => Some(*s),
            Self::F32(_) | Self::Bf16(_) => None,
        }
    }
}

impl<'a> SliceMut<'a> {
    /// Element type.
    pub(crate) fn dtype(&self) -> DType {
        self.as_slice().dtype()
    }

    /// Some of the elements.
    pub(crate) fn range(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(s) => Self::F32(&mut s[range]),
            Self::Bf16(s) => Self::Bf16(&mut s[range]),
            Self::Cuda(s) => Self::Cuda(s.range(range)),
        }
    }

    /// The elements before and from `at`.
    pub(crate) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::F32(s) => {
                let (low, high) = s.split_at_mut(at);
                (Self::F32(low), Self::F32(high))
            }
            Self::Bf16(s) => {
                let (low, high) = s.split_at_mut(at);
                (Self::Bf16(low), Self::Bf16(high))
            }
            Self::Cuda(s) => (Self::Cuda(s.range(0..at)), Self::Cuda(s.range(at..s.len))),
        }
    }

    /// A shorter borrow.
    pub(crate) fn reborrow(&mut self) -> SliceMut<'_> {
        match self {
            Self::F32(s) => SliceMut::F32(s),
            Self::Bf16(s) => SliceMut::Bf16(s),
            Self::Cuda(s) => SliceMut::Cuda(*s),
        }
    }

    /// The same elements, to be read.
    pub(crate) fn as_slice(&self) -> Slice<'_> {
        match self {
            Self::F32(s) => Slice::F32(s),
            Self::Bf16(s) => Slice::Bf16(s),
            Self::Cuda(s) => Slice::Cuda(*s),
        }
    }

    /// The elements, if a GPU holds them.
    pub(crate) fn cuda(&self) -> Option<DeviceSlice<'a>> {
        match self {
            Self::Cuda(s) => Some(*s),
            Self::F32(_) | Self::Bf16(_) => None,
        }
    }
}

/// Owned elements of either dtype.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// f32 elements.
    F32(Vec<f32>),
    /// bf16 elements.
    Bf16(Vec<bf16>),
    /// Elements in the memory of a GPU.
    Cuda(DeviceBuffer),
}

/// Owned elements in the memory of a GPU.
#[derive(Debug)]
pub struct DeviceBuffer {
    memory: Memory,
    dtype: DType,
    len: usize,
}

impl Clone for DeviceBuffer {
    fn clone(&self) -> Self {
        let device = self.memory.device();
        let memory = device.alloc(self.memory.bytes());
        // A failure is remembered by the device and reported by its next operation.
        let _ = device.copy(memory.ptr(), self.memory.ptr(), self.memory.bytes());
        Self { memory, ..*self }
    }
}

impl Buffer {
    /// `len` zeros in host memory. The pages of a large buffer are only touched when it is written.
    #[must_use]
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::Bf16 => Self::Bf16(bytemuck::allocation::zeroed_vec(len)),
        }
    }

    /// `len` elements in the memory of `device`: zeros in host memory, unspecified on a GPU.
    ///
    /// A GPU that is out of memory says so with its next operation.
    #[must_use]
    pub fn new(device: &Device, dtype: DType, len: usize) -> Self {
        match device {
            Device::Cpu => Self::zeros(dtype, len),
            Device::Cuda(device) => Self::Cuda(DeviceBuffer {
                memory: device.alloc(len * dtype.bytes()),
                dtype,
                len,
            }),
        }
    }

    /// [`Buffer::new`] for what is written, read and dropped within one pass: it may be recorded in a graph.
    #[must_use]
    pub fn temporary(device: &Device, dtype: DType, len: usize) -> Self {
        match device {
            Device::Cpu => Self::zeros(dtype, len),
            Device::Cuda(device) => Self::Cuda(DeviceBuffer {
                memory: device.alloc_temporary(len * dtype.bytes()),
                dtype,
                len,
            }),
        }
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
            Self::Cuda(b) => b.dtype,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::Bf16(v) => v.len(),
            Self::Cuda(b) => b.len,
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as little-endian bytes, to be filled by a reader; none if a GPU holds them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(v) => bytemuck::cast_slice_mut(v),
            Self::Bf16(v) => bytemuck::cast_slice_mut(v),
            Self::Cuda(_) => &mut [],
        }
    }

    /// Where the elements are.
    #[must_use]
    pub fn device(&self) -> Device {
        match self {
            Self::F32(_) | Self::Bf16(_) => Device::Cpu,
            Self::Cuda(b) => Device::Cuda(Arc::clone(b.memory.device())),
        }
    }

    /// The first `len` elements.
    pub(super) fn slice(&self, len: usize) -> Slice<'_> {
        match self {
            Self::F32(v) => Slice::F32(&v[..len]),
            Self::Bf16(v) => Slice::Bf16(&v[..len]),
            Self::Cuda(b) => Slice::Cuda(b.slice(len)),
        }
    }

    /// The first `len` elements, to be written.
    pub(super) fn slice_mut(&mut self, len: usize) -> SliceMut<'_> {
        match self {
            Self::F32(v) => SliceMut::F32(&mut v[..len]),
            Self::Bf16(v) => SliceMut::Bf16(&mut v[..len]),
            Self::Cuda(b) => SliceMut::Cuda(b.slice(len)),
        }
    }
}

impl DeviceBuffer {
    fn slice(&self, len: usize) -> DeviceSlice<'_> {
        let all = DeviceSlice {
            memory: &self.memory,
            dtype: self.dtype,
            start: 0,
            len: self.len,
        };
        all.range(0..len)
    }
}
