//! Memory of what is made and dropped within one pass.
//!
//! A graph keeps the addresses it was recorded with, and nothing can be allocated in the stream that is recorded. What
//! is asked for meanwhile is allocated beside it and goes back to a pool that all graphs of a device share: they run
//! one after the other, and nothing in these blocks outlives a run.

use super::{CudaDevice, SideStream, error, lock};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

/// The pool while there are graphs, or one is recorded.
#[derive(Default)]
pub(super) struct Temporaries(Mutex<Weak<Pool>>);

/// Blocks of graphs.
pub(super) struct Pool {
    /// On which blocks are allocated. What else happens on it: nothing.
    beside: SideStream,
    /// Addresses by number of bytes.
    free: Mutex<BTreeMap<usize, Vec<u64>>>,
}

impl Temporaries {
    /// The pool of the graphs there are, or a new one.
    pub(super) fn pool(&self, device: &Arc<CudaDevice>) -> Result<Arc<Pool>> {
        let mut held = lock(&self.0);
        if let Some(pool) = held.upgrade() {
            return Ok(pool);
        }
        let pool = Arc::new(Pool {
            beside: device.side_stream()?,
            free: Mutex::default(),
        });
        *held = Arc::downgrade(&pool);
        Ok(pool)
    }
}

impl Pool {
    /// `bytes` bytes, more than none.
    pub(super) fn take(&self, bytes: usize) -> Result<u64> {
        if let Some(ptr) = lock(&self.free).get_mut(&bytes).and_then(Vec::pop) {
            return Ok(ptr);
        }
        let device = self.beside.device();
        device.allocations.fetch_add(1, Ordering::Relaxed);
        let (stream, mut ptr) = (self.beside.as_raw(), 0);
        // SAFETY: the pointer is valid for one address; the stream is open and is not captured.
        let status = unsafe { (device.driver.alloc_async)(&mut ptr, bytes, stream) };
        if error::is_out_of_memory(status) {
            return device.record(Err(Error::Invalid {
                op: "cuda::alloc",
                message: format!("no {bytes} bytes are left for a graph"),
            }));
        }
        device.done("allocating memory of graphs", status)?;
        // SAFETY: the stream is open; from now on any stream may use the block.
        let status = unsafe { (device.driver.stream_synchronize)(stream) };
        device.done("allocating memory of graphs", status)?;
        Ok(ptr)
    }

    /// Takes back what is not in use any more.
    pub(super) fn give(&self, bytes: usize, ptr: u64) {
        lock(&self.free).entry(bytes).or_default().push(ptr);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for &ptr in lock(&self.free).values().flatten() {
            self.beside.device().free(ptr);
        }
    }
}
