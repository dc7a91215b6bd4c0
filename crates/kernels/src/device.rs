//! Where tensors live and operations run.

use crate::cuda::CudaDevice;
use crate::{Error, Result};
use std::fmt;
use std::sync::Arc;

/// A processor with its memory.
#[derive(Clone, Debug, Default)]
pub enum Device {
    /// The host.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda(Arc<CudaDevice>),
}

impl Device {
    /// GPU number `ordinal` of those this process sees.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, or it is too old; the message says which.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self::Cuda(CudaDevice::open(ordinal)?))
    }

    /// Whether this is a GPU.
    #[must_use]
    pub fn is_cuda(&self) -> bool {
        matches!(self, Self::Cuda(_))
    }

    /// Waits until everything issued is done.
    ///
    /// # Errors
    /// The first failure of anything issued since the device was opened.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(device) => device.synchronize(),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(device) => write!(f, "cuda:{} ({})", device.ordinal(), device.name()),
        }
    }
}

/// The GPU that holds all of `arguments`, or `None` if the host does.
pub(crate) fn common<'a>(
    op: &'static str,
    arguments: &[Option<&'a Arc<CudaDevice>>],
) -> Result<Option<&'a Arc<CudaDevice>>> {
    let first = arguments.first().copied().flatten();
    let same = |other: &Option<&Arc<CudaDevice>>| match (first, other) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    };
    if arguments.iter().all(same) {
        return Ok(first);
    }
    Err(Error::Invalid {
        op,
        message: "arguments lie on different devices; move them to one with to_device".into(),
    })
}
