//! Sums over label rows, kept where they are computed until somebody reads them.

use crate::cuda::Memory;
use crate::{Device, Result};
use std::ops::AddAssign;

/// What a set of label rows adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// Sum of the losses, in nats.
    pub loss: f64,
    /// Number of label rows.
    pub count: u64,
    /// Rows whose largest logit is the target's (the first of equal ones counts).
    pub correct: u64,
    /// Sum of the entropies of the predictions, in nats.
    pub entropy: f64,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.count += other.count;
        self.correct += other.correct;
        self.entropy += other.entropy;
    }
}

/// [`Sums`] of several calls. On a GPU they stay there until [`Accumulator::read`].
#[derive(Debug, Default)]
pub struct Accumulator {
    host: Sums,
    memory: Option<Memory>,
}

/// The part of [`Sums`] that a GPU adds up.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct DeviceSums {
    loss: f64,
    entropy: f64,
    correct: u64,
    count: u64,
}

impl Accumulator {
    /// Zeros on `device`.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        let mut sums = Self::default();
        if let Device::Cuda(device) = device {
            let memory = device.alloc(size_of::<DeviceSums>());
            // A failure is remembered by the device and reported by its next operation.
            let _ = device.fill_zero(memory.ptr(), memory.bytes());
            sums.memory = Some(memory);
        }
        sums
    }

    /// Zeros again, in the same place.
    pub fn clear(&mut self) {
        self.host = Sums::default();
        if let Some(memory) = &self.memory {
            // A failure is remembered by the device and reported by its next operation.
            let _ = memory.device().fill_zero(memory.ptr(), memory.bytes());
        }
    }

    /// Adds sums that the host knows.
    pub(super) fn add(&mut self, sums: Sums) {
        self.host += sums;
    }

    /// f64 loss, f64 entropy, u64 correct rows and u64 rows, 32 bytes in all; `None` on the host.
    pub(crate) fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// The sums so far. Waits for a GPU.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn read(&self) -> Result<Sums> {
        let mut sums = self.host;
        if let Some(memory) = &self.memory {
            let mut device = DeviceSums::default();
            let bytes = bytemuck::bytes_of_mut(&mut device);
            memory.device().download(bytes, memory.ptr())?;
            sums += device.into();
        }
        Ok(sums)
    }
}

impl From<DeviceSums> for Sums {
    fn from(sums: DeviceSums) -> Self {
        let DeviceSums {
            loss,
            entropy,
            correct,
            count,
        } = sums;
        Self {
            loss,
            count,
            correct,
            entropy,
        }
    }
}
