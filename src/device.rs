//! Which device a command computes on.

use ferrotune_core::Result;
use ferrotune_core::config::Device as Choice;
use ferrotune_kernels::{DType, Device, cuda};

/// The device that `choice` means on this machine: `auto` is the first GPU if there is one, else the
/// CPU.
///
/// # Errors
/// For `cuda` without a usable GPU: what is missing, and how to get it.
pub fn open(choice: Choice) -> Result<Device> {
    let found = match choice {
        Choice::Cpu => false,
        Choice::Cuda => true,
        Choice::Auto => cuda::device_count().is_ok_and(|gpus| gpus > 0),
    };
    if found {
        Ok(Device::cuda(0)?)
    } else {
        Ok(Device::Cpu)
    }
}

/// Dtype of activations beside `weights` on `device`: a CPU computes in f32, a GPU in the dtype of
/// its weights, as its products need.
#[must_use]
pub fn activation_dtype(device: &Device, weights: DType) -> DType {
    match device {
        Device::Cpu => DType::F32,
        Device::Cuda(_) => weights,
    }
}
