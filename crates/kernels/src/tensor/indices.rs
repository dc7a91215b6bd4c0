//! Integers that operations look things up with: token ids, label rows, sequence bounds.

use crate::Device;
use crate::cuda::{CudaDevice, Memory};
use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

/// u32 values that the host knows, with a copy on the GPU where the operation runs there.
///
/// Reads as a slice. Operations check the values on the host and use the copy on the GPU.
#[derive(Debug)]
pub struct Indices<'a> {
    host: Cow<'a, [u32]>,
    memory: Option<Memory>,
}

impl<'a> Indices<'a> {
    /// Borrows or takes `values`, and copies them to `device` if that is a GPU.
    pub fn new(values: impl Into<Cow<'a, [u32]>>, device: &Device) -> Self {
        let host = values.into();
        let memory = match device {
            Device::Cpu => None,
            Device::Cuda(device) => {
                let memory = device.alloc(size_of_val::<[u32]>(&host));
                // A failure is remembered by the device and reported by its next operation.
                let _ = device.upload(memory.ptr(), bytemuck::cast_slice(&host));
                Some(memory)
            }
        };
        Self { host, memory }
    }

    /// Values in host memory alone.
    pub fn host(values: impl Into<Cow<'a, [u32]>>) -> Self {
        Self::new(values, &Device::Cpu)
    }

    /// The GPU that has a copy, if there is one.
    pub(crate) fn device(&self) -> Option<&Arc<CudaDevice>> {
        self.memory.as_ref().map(Memory::device)
    }

    /// Address of the copy in the memory of the GPU; 0 if there is none.
    pub(crate) fn ptr(&self) -> u64 {
        self.memory.as_ref().map_or(0, Memory::ptr)
    }
}

impl Deref for Indices<'_> {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.host
    }
}
