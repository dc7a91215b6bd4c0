//! CUDA graphs: a sequence of operations recorded once and replayed with one call.

use super::temporary::Pool;
use super::{CudaDevice, Handle, lock};
use crate::error::ErrorKind;
use crate::{Error, Result};
use cudarc::driver::sys::CUstreamCaptureMode_enum as mode;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What a device knows about a capture in progress.
#[derive(Default)]
pub(super) struct Capture {
    active: AtomicBool,
    /// Memory dropped meanwhile; the graph may still use it, so it is freed with the graph.
    dropped: Mutex<Vec<u64>>,
    /// Where memory is that is made meanwhile.
    pool: Mutex<Option<Arc<Pool>>>,
}

impl Capture {
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Where temporary memory comes from; `None` if nothing is being recorded.
    pub(super) fn pool(&self) -> Option<Arc<Pool>> {
        lock(&self.pool).clone()
    }

    /// Keeps `ptr` for the graph; false if none is being recorded.
    pub(super) fn defer_free(&self, ptr: u64) -> bool {
        let mut dropped = lock(&self.dropped);
        let active = self.is_active();
        if active {
            dropped.push(ptr);
        }
        active
    }
}

/// What came of recording operations.
#[derive(Debug)]
pub enum Captured {
    /// They can be replayed; none has run yet.
    Graph(Graph),
    /// They cannot be recorded here; none has run. Issue them one by one.
    Eager {
        /// Why.
        reason: String,
    },
}

/// Recorded operations. They use the addresses they were recorded with, so all memory they touch
/// must outlive the graph; what was dropped while they were recorded does.
pub struct Graph {
    device: Arc<CudaDevice>,
    executable: Handle,
    dropped: Vec<u64>,
    /// Keeps the blocks that it uses.
    _pool: Option<Arc<Pool>>,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph on {:?}", self.device)
    }
}

impl Graph {
    /// Runs the recorded operations, after everything issued so far.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn launch(&self) -> Result<()> {
        let device = &self.device;
        device.enter()?;
        device.count_launch();
        // SAFETY: graph and stream are open.
        let status = unsafe { (device.driver.graph_launch)(self.executable.0, device.stream.0) };
        device.done("launching a graph", status)?;
        device.mark(|| "graph".to_owned())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: open, and closed nowhere else; the driver waits for a run in progress.
        unsafe {
            (self.device.driver.context_set_current)(self.device.context.0);
            (self.device.driver.graph_exec_destroy)(self.executable.0);
        }
        self.device.free_all(&self.dropped);
    }
}

impl CudaDevice {
    /// Records what `body` issues on this device instead of running it.
    ///
    /// Allocations that are not temporary, uploads, downloads and waits cannot be recorded. If one of them, or the driver,
    /// stands in the way, the answer is [`Captured::Eager`], and the device is as before.
    ///
    /// # Errors
    /// The first failure of the device, if it had one before; a fault of the device.
    pub fn capture(self: &Arc<Self>, body: impl FnOnce() -> Result<()>) -> Result<Captured> {
        self.enter()?;
        if let Err(error) = self.begin_capture() {
            return self.eager(&error);
        }
        let issued = body();
        let graph = self.end_capture();
        match issued.and_then(|()| self.check()).and(graph) {
            Ok(graph) => Ok(Captured::Graph(graph)),
            Err(error) => self.eager(&error),
        }
    }

    fn begin_capture(self: &Arc<Self>) -> Result<()> {
        let pool = self.temporaries.pool(self)?;
        // Other threads may talk to the driver meanwhile.
        let mode = mode::CU_STREAM_CAPTURE_MODE_RELAXED as u32;
        // SAFETY: the stream is open.
        let status = unsafe { (self.driver.capture_begin)(self.stream.0, mode) };
        super::error::driver(self.driver, "starting to record a graph", status)?;
        *lock(&self.capture.pool) = Some(pool);
        self.capture.active.store(true, Ordering::Release);
        Ok(())
    }

    fn end_capture(self: &Arc<Self>) -> Result<Graph> {
        let (mut recorded, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a capture is in progress on the stream; the pointer is valid for one handle.
        let status = unsafe { (self.driver.capture_end)(self.stream.0, &mut recorded) };
        let dropped = {
            let mut dropped = lock(&self.capture.dropped);
            self.capture.active.store(false, Ordering::Release);
            std::mem::take(&mut *dropped)
        };
        let pool = lock(&self.capture.pool).take();
        let mut prepare = || {
            super::error::driver(self.driver, "recording a graph", status)?;
            // SAFETY: the graph is whole and is destroyed once; the pointer is valid for one handle.
            let status = unsafe {
                let status = (self.driver.graph_instantiate)(&mut executable, recorded, 0);
                (self.driver.graph_destroy)(recorded);
                status
            };
            super::error::driver(self.driver, "preparing a graph", status)
        };
        if let Err(error) = prepare() {
            self.free_all(&dropped);
            return Err(error);
        }
        Ok(Graph {
            device: Arc::clone(self),
            executable: Handle(executable),
            dropped,
            _pool: pool,
        })
    }

    fn free_all(&self, pointers: &[u64]) {
        for &ptr in pointers {
            self.free(ptr);
        }
    }

    /// Forgets a failure that only the recording had.
    fn eager(&self, error: &Error) -> Result<Captured> {
        if error.kind() == ErrorKind::DeviceFault {
            return self.record(Err(error.replica()));
        }
        let mut first = lock(&self.first_error);
        *first = None;
        self.failed.store(false, Ordering::Release);
        Ok(Captured::Eager {
            reason: error.to_string(),
        })
    }
}
