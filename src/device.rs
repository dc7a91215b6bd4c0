//! Which device a command computes on.

use ferrotune_core::config::Device as Choice;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{DType, Device, cuda};

/// The device that `choice` means on this machine: `auto` is a GPU if there is one, else the CPU.
///
/// # Errors
/// For `cuda` without a usable GPU: what is missing, and how to get it.
pub fn open(choice: Choice) -> Result<Device> {
    open_for(choice, 0)
}

/// [`open`] for one of several processes of a machine: each has the GPU of its own number, or the only
/// one there is, where the launcher shows each process its own.
///
/// # Errors
/// As [`open`]; [`Error::Config`] if there are fewer GPUs than processes.
pub fn open_for(choice: Choice, local_rank: usize) -> Result<Device> {
    let gpus = match choice {
        Choice::Cpu => 0,
        Choice::Auto => cuda::device_count().unwrap_or(0),
        Choice::Cuda if local_rank == 0 => return Ok(Device::cuda(0)?),
        Choice::Cuda => cuda::device_count()?,
    };
    match gpus {
        0 => Ok(Device::Cpu),
        1 => Ok(Device::cuda(0)?),
        _ if local_rank < gpus => Ok(Device::cuda(local_rank)?),
        _ => Err(Error::config(
            "device",
            format!(
                "local rank {local_rank} has no GPU: {gpus} are visible; start one process per GPU, or use device: \
                 cpu"
            ),
        )),
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
