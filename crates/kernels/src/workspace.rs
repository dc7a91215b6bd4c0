//! Reuse of activation buffers between steps.

use crate::{Buffer, DType, Device, IndexBlock, Indices, Tensor};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A pool of activation buffers, so that a training step allocates nothing after the first.
///
/// Every buffer has room for as many rows as the longest batch so far, so that batches of different
/// lengths share the same buffers. Contents are stale: an operation writes every element it is asked
/// to write.
#[derive(Debug, Default)]
pub struct Workspace {
    device: Device,
    pool: Mutex<Pool>,
    tables: Mutex<IndexBlock>,
}

#[derive(Debug, Default)]
struct Pool {
    max_rows: usize,
    /// Buffers that were taken and not given back.
    lent: usize,
    /// Times that free buffers were dropped.
    generation: u64,
    /// Free buffers by dtype and length, each `max_rows` times some number of columns.
    free: BTreeMap<(DType, usize), Vec<Buffer>>,
    /// Free scratch memory by dtype and length, whatever the number of rows.
    scratch: BTreeMap<(DType, usize), Vec<Buffer>>,
}

impl Workspace {
    /// A pool in host memory for matrices of `max_rows` rows; it grows when a longer one is asked
    /// for.
    #[must_use]
    pub fn new(max_rows: usize) -> Self {
        Self::on(Device::Cpu, max_rows)
    }

    /// A pool in the memory of `device`.
    #[must_use]
    pub fn on(device: Device, max_rows: usize) -> Self {
        let pool = Pool {
            max_rows,
            ..Pool::default()
        };
        Self {
            device,
            pool: Mutex::new(pool),
            tables: Mutex::default(),
        }
    }

    /// Where the buffers are.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A matrix with unspecified contents.
    #[must_use]
    pub fn take(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let mut pool = self.pool();
        if rows > pool.max_rows {
            // The buffers at hand are too short for what comes now.
            pool.max_rows = rows;
            pool.drop_free();
        }
        pool.lent += 1;
        let len = pool.max_rows * cols;
        let reused = pool.free.get_mut(&(dtype, len)).and_then(Vec::pop);
        let buffer = reused.unwrap_or_else(|| Buffer::new(&self.device, dtype, len));
        Tensor::from_buffer(buffer, rows, cols)
    }

    /// Columns of a matrix that has room for `cols` and starts every row on 16 bytes.
    #[must_use]
    pub fn aligned(dtype: DType, cols: usize) -> usize {
        cols.next_multiple_of(16 / dtype.bytes())
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
        let cols = tensor.cols();
        let buffer = tensor.into_buffer();
        let mut pool = self.pool();
        pool.lent = pool.lent.saturating_sub(1);
        if buffer.len() == pool.max_rows * cols {
            pool.free
                .entry((buffer.dtype(), buffer.len()))
                .or_default()
                .push(buffer);
        }
    }

    /// `len` elements with unspecified contents, for what does not grow with the batch.
    #[must_use]
    pub fn take_scratch(&self, dtype: DType, len: usize) -> Buffer {
        let reused = {
            let mut pool = self.pool();
            pool.lent += 1;
            pool.scratch.get_mut(&(dtype, len)).and_then(Vec::pop)
        };
        reused.unwrap_or_else(|| Buffer::new(&self.device, dtype, len))
    }

    /// Returns scratch memory to the pool.
    pub fn give_scratch(&self, buffer: Buffer) {
        let key = (buffer.dtype(), buffer.len());
        let mut pool = self.pool();
        pool.lent = pool.lent.saturating_sub(1);
        pool.scratch.entry(key).or_default().push(buffer);
    }

    /// Which buffers there are: another number after any of them was freed. `None` while somebody holds
    /// one that is not given back yet, and may free it.
    #[must_use]
    pub fn generation(&self) -> Option<u64> {
        let pool = self.pool();
        (pool.lent == 0).then_some(pool.generation)
    }

    /// Frees everything that is given back.
    pub fn clear(&self) {
        let mut pool = self.pool();
        pool.drop_free();
        pool.scratch.clear();
        // What was lost on the way out of a failure does not come back.
        pool.lent = 0;
    }

    /// Tables of a pass where it runs: on a GPU in one copy, in memory that the next pass uses again.
    #[must_use]
    pub fn indices<'a, const N: usize>(&self, tables: [Cow<'a, [u32]>; N]) -> [Indices<'a>; N] {
        let mut block = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        block.upload(&self.device, tables)
    }

    /// Bytes of the buffers that lie in the pool. Between passes, when everything is given back, that is
    /// all it holds: it frees nothing but what has become too short.
    #[must_use]
    pub fn pooled_bytes(&self) -> usize {
        let pool = self.pool();
        let kinds = pool.free.iter().chain(&pool.scratch);
        kinds
            .map(|((dtype, len), buffers)| buffers.len() * len * dtype.bytes())
            .sum()
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // A panic while the lock is held leaves the pool whole: only `pop` and `push` run inside.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    fn drop_free(&mut self) {
        self.free.clear();
        self.generation += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_buffers(workspace: &Workspace) -> usize {
        workspace.pool().free.values().map(Vec::len).sum()
    }

    #[test]
    fn shorter_batches_reuse_the_buffer_of_the_longest() {
        let workspace = Workspace::new(8);
        let mut long = workspace.take(DType::F32, 8, 4);
        long.view_mut().fill(3.0);
        workspace.give(long);
        let short = workspace.take(DType::F32, 2, 4);
        assert_eq!(short.view().shape(), [2, 4]);
        assert_eq!(short.into_buffer().len(), 32);
        assert_eq!(free_buffers(&workspace), 0);
    }

    #[test]
    fn buffers_that_became_too_short_are_not_kept() {
        let workspace = Workspace::new(0);
        let (short, other) = (
            workspace.take(DType::F32, 2, 4),
            workspace.take(DType::F32, 2, 4),
        );
        workspace.give(other);
        let long = workspace.take(DType::F32, 8, 4);
        workspace.give(short);
        workspace.give(long);
        assert_eq!(free_buffers(&workspace), 1);
        assert_eq!(workspace.take(DType::F32, 5, 4).into_buffer().len(), 32);
    }

    #[test]
    fn aligned_columns_are_whole_sixteen_bytes() {
        let cases = [
            (DType::Bf16, [1, 8, 9], [8, 8, 16]),
            (DType::F32, [1, 4, 5], [4, 4, 8]),
        ];
        for (dtype, cols, aligned) in cases {
            assert_eq!(cols.map(|cols| Workspace::aligned(dtype, cols)), aligned);
        }
    }

    #[test]
    fn freed_buffers_make_another_generation() {
        let workspace = Workspace::new(4);
        let first = workspace.generation().expect("nothing is lent");
        let (matrix, scratch) = (
            workspace.take(DType::F32, 4, 2),
            workspace.take_scratch(DType::F32, 9),
        );
        assert_eq!(workspace.generation(), None, "two are lent");
        workspace.give(matrix);
        workspace.give_scratch(scratch);
        assert_eq!(workspace.generation(), Some(first));
        workspace.give(workspace.take(DType::F32, 5, 2));
        assert_ne!(workspace.generation(), Some(first));
    }
}
