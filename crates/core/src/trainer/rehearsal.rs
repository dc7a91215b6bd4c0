//! Micro-steps before the first, so that no step waits for what can be had ahead.

use super::step::Trainer;
use crate::Result;
use crate::data::BatchSize;

impl Trainer {
    /// On a GPU, runs a micro-step of each of these sizes on invented tokens: kernels are compiled and
    /// loaded, algorithms of products chosen, memory allocated, before there is a step to wait for them.
    /// What is trained stays as it is. Every rank calls it, and uses the algorithms that rank 0 chose.
    ///
    /// # Errors
    /// What a step of that size would fail with, as for want of memory.
    pub fn rehearse(&mut self, sizes: &[BatchSize]) -> Result<()> {
        // Beside others, shapes depend on what they bring.
        if !self.options.device.is_cuda() || self.seat.is_some() {
            return Ok(());
        }
        self.optimizer.prepare()?;
        self.share_algorithms()?;
        // Where operations find them.
        let _ = (self.params.home(), self.grads.home());
        let mut sizes = sizes.to_vec();
        // Buffers of the longest do for the others.
        sizes.sort_by_key(|size| std::cmp::Reverse((size.tokens, size.label_rows)));
        for size in sizes {
            let batch = match self.model.config().classifier {
                Some(_) => size.invented().with_classes(size.label_rows),
                None => size.invented(),
            };
            self.add_gradient(&batch, false)?;
        }
        self.share_algorithms()?;
        self.grads.zero();
        self.sums.clear();
        Ok(self.options.device.synchronize()?)
    }

    /// Micro-steps that are recorded as graphs, for as many shapes of micro-batches.
    #[must_use]
    pub fn recorded_graphs(&self) -> usize {
        self.graphs.len()
    }
}
