use super::cuda;
use crate::cuda::{CudaDevice, Memory};
use crate::device::common;
use crate::{Device, Result, ViewMut};
use std::sync::Arc;

/// What a quantised matrix is made of: `H` in the memory of the host, or `N` arrays in that of a GPU.
#[derive(Debug)]
pub(super) enum Stored<H, const N: usize> {
    Host(H),
    /// With the addresses of the arrays.
    Cuda(Memory, [u64; N]),
}

impl<H, const N: usize> Stored<H, N> {
    /// Moves host memory to a GPU; `arrays` are those of it.
    pub(super) fn moved_to(self, device: &Device, arrays: impl FnOnce(&H) -> [&[u8]; N]) -> Self {
        match (self, device) {
            (Self::Host(host), Device::Cuda(device)) => {
                let (memory, addresses) = cuda::upload(device, arrays(&host));
                Self::Cuda(memory, addresses)
            }
            (stored, _) => stored,
        }
    }

    /// Refuses an output in another memory.
    pub(super) fn check(&self, op: &'static str, out: &ViewMut<'_>) -> Result<()> {
        common(op, &[self.gpu(), out.device()]).map(|_| ())
    }

    pub(super) fn device(&self) -> Device {
        self.gpu()
            .map_or(Device::Cpu, |gpu| Device::Cuda(Arc::clone(gpu)))
    }

    fn gpu(&self) -> Option<&Arc<CudaDevice>> {
        match self {
            Self::Host(_) => None,
            Self::Cuda(memory, _) => Some(memory.device()),
        }
    }
}
