//! Which algorithm of a GPU's library computes which product: what the bits of a run depend on besides its
//! data, where algorithms are chosen by measuring.

use super::step::Trainer;
use crate::{Error, Result};
use ferrotune_kernels::Device;
use ferrotune_kernels::cuda::GemmRecord;

impl Trainer {
    /// The algorithms chosen so far, one per shape of product; none on a CPU.
    #[must_use]
    pub fn algorithms(&self) -> Vec<GemmRecord> {
        match &self.options.device {
            Device::Cpu => Vec::new(),
            Device::Cuda(device) => device.algorithms(),
        }
    }

    /// Uses recorded algorithms from now on; returns how many of them. Those of another GPU or another
    /// version of its library are left out.
    ///
    /// # Errors
    /// The first failure of the GPU.
    pub fn replay_algorithms(&self, records: &[GemmRecord]) -> Result<usize> {
        match &self.options.device {
            Device::Cpu => Ok(0),
            Device::Cuda(device) => Ok(device.replay(records)?),
        }
    }

    /// Makes every rank use what rank 0 has chosen.
    pub(super) fn share_algorithms(&mut self) -> Result<()> {
        if self.group.world_size() == 1 || !self.options.device.is_cuda() {
            return Ok(());
        }
        let fault = |e: serde_json::Error| Error::Transient {
            message: format!(
                "rank 0 sent its algorithms in a form that this rank cannot read: {e}"
            ),
        };
        let mine = serde_json::to_vec(&self.algorithms()).map_err(fault)?;
        let all = self.group.all_gather(&mine)?;
        let first: Vec<GemmRecord> = serde_json::from_slice(&all[0]).map_err(fault)?;
        if self.group.rank() > 0 {
            self.replay_algorithms(&first)?;
        }
        Ok(())
    }
}
