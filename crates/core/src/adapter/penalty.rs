//! A term of the objective beside the loss over the data.

use crate::Result;
use ferrotune_kernels::{Device, Tensor};

/// What a method adds to the mean loss: a factor times the sum of values, where they were computed. None by default.
#[derive(Debug, Default)]
pub struct Penalty(Option<(f64, Tensor)>);

impl Penalty {
    /// `factor` times the sum of `values`.
    #[must_use]
    pub fn new(factor: f64, values: Tensor) -> Self {
        Self(Some((factor, values)))
    }

    /// Its value, for which the host waits if that is on a GPU.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn value(&self) -> Result<f64> {
        let Some((factor, values)) = &self.0 else {
            return Ok(0.0);
        };
        let sum: f64 = values.to_f32_vec().into_iter().map(f64::from).sum();
        if let Device::Cuda(device) = values.device() {
            device.check()?;
        }
        Ok(factor * sum)
    }
}
