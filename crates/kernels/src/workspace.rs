//! Reuse of activation buffers between steps.

use crate::{Buffer, DType, Tensor};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// A pool of activation buffers, so that a training step allocates nothing after the first.
///
/// Every buffer is sized for `max_rows` rows, the longest micro-batch of the run, so that batches
/// of different lengths share the same buffers. Contents are stale: an operation writes every
/// element it is asked to write.
#[derive(Debug, Default)]
pub struct Workspace {
    max_rows: usize,
    free: Mutex<BTreeMap<(DType, usize), Vec<Buffer>>>,
}

impl Workspace {
    /// A pool for matrices of at most `max_rows` rows; longer ones are allocated as asked.
    #[must_use]
    pub fn new(max_rows: usize) -> Self {
        Self {
            max_rows,
            free: Mutex::default(),
        }
    }

    /// A matrix with unspecified contents.
    #[must_use]
    pub fn take(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let len = rows.max(self.max_rows) * cols;
        let reused = self.pool().get_mut(&(dtype, len)).and_then(Vec::pop);
        let buffer = reused.unwrap_or_else(|| Buffer::zeros(dtype, len));
        Tensor::from_buffer(buffer, rows, cols)
    }

    /// A matrix of zeros.
    #[must_use]
    pub fn take_zeroed(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let mut tensor = self.take(dtype, rows, cols);
        tensor.view_mut().fill(0.0);
        tensor
    }

    /// Returns a matrix to the pool. One that is dropped instead is simply freed.
    pub fn give(&self, tensor: Tensor) {
        let buffer = tensor.into_buffer();
        self.pool()
            .entry((buffer.dtype(), buffer.len()))
            .or_default()
            .push(buffer);
    }

    /// Frees every buffer that is not in use.
    pub fn clear(&self) {
        self.pool().clear();
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, BTreeMap<(DType, usize), Vec<Buffer>>> {
        // A panic while the lock is held leaves the map whole: only `pop` and `push` run inside.
        self.free
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shorter_batches_reuse_the_buffer_of_the_longest() {
        let pool = Workspace::new(8);
        let mut long = pool.take(DType::F32, 8, 4);
        long.view_mut().fill(3.0);
        pool.give(long);
        let short = pool.take(DType::F32, 2, 4);
        assert_eq!(short.view().shape(), [2, 4]);
        assert_eq!(short.into_buffer().len(), 32);
        assert!(pool.pool().values().all(Vec::is_empty));
    }
}
