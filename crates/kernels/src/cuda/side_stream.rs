//! A second stream beside the one of operations, for libraries that bring their own kernels and for what is written
//! ahead of its use, and the events that order the two.

use super::{CudaDevice, Handle};
use crate::{Error, Result};
use cudarc::driver::sys as cu;
use std::cell::Cell;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

thread_local! {
    /// Where this thread issues operations, if that is a side stream, and of which device.
    static ISSUED_ON: Cell<Option<(*const CudaDevice, Handle)>> = const { Cell::new(None) };
}

/// A stream beside the one on which the operations of this crate run. What is issued here runs at the
/// same time as those, in its own order.
pub struct SideStream {
    device: Arc<CudaDevice>,
    stream: Handle,
}

impl fmt::Debug for SideStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SideStream on {:?}", self.device)
    }
}

/// A point of a stream: once it is passed, everything issued before it is done.
pub struct Event {
    device: Arc<CudaDevice>,
    event: Handle,
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event on {:?}", self.device)
    }
}

impl CudaDevice {
    /// Makes this GPU the current one of the calling thread, as libraries that find it so need it.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn make_current(&self) -> Result<()> {
        self.enter()
    }

    /// A new stream.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn side_stream(self: &Arc<Self>) -> Result<SideStream> {
        self.enter()?;
        let mut stream = std::ptr::null_mut();
        let flags = cu::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is valid for one handle.
        let status = unsafe { (self.driver.stream_create)(&mut stream, flags) };
        self.done("opening a stream", status)?;
        Ok(SideStream {
            device: Arc::clone(self),
            stream: Handle(stream),
        })
    }

    /// The point after everything that operations have issued so far.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn event(self: &Arc<Self>) -> Result<Event> {
        self.event_on(self.stream)
    }

    /// Operations issued from now on run after `event`.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.wait_on(self.stream, event)
    }

    /// Where kernels, copies and fills of this thread go.
    pub(super) fn current(&self) -> Handle {
        match ISSUED_ON.get() {
            Some((device, stream)) if std::ptr::eq(device, self) => stream,
            _ => self.stream,
        }
    }

    /// Refuses what belongs to the stream of operations while this thread issues on another.
    pub(super) fn on_own_stream(&self, what: &str) -> Result<()> {
        if self.current() == self.stream {
            return Ok(());
        }
        self.record(Err(Error::Invalid {
            op: "cuda",
            message: format!("no {what} on a side stream"),
        }))
    }

    fn wait_on(&self, stream: Handle, event: &Event) -> Result<()> {
        self.enter()?;
        // SAFETY: event and stream are open; an event may be destroyed while a stream waits for it.
        let status = unsafe { (self.driver.stream_wait_event)(stream.0, event.event.0, 0) };
        self.done("ordering two streams", status)
    }

    fn event_on(self: &Arc<Self>, stream: Handle) -> Result<Event> {
        self.enter()?;
        let mut event = std::ptr::null_mut();
        let flags = cu::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the pointer is valid for one handle.
        let status = unsafe { (self.driver.event_create)(&mut event, flags) };
        self.done("creating an event", status)?;
        let event = Event {
            device: Arc::clone(self),
            event: Handle(event),
        };
        // SAFETY: event and stream are open.
        let status = unsafe { (self.driver.event_record)(event.event.0, stream.0) };
        self.done("marking a point of the stream", status)?;
        Ok(event)
    }
}

impl SideStream {
    /// The GPU.
    #[must_use]
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// The driver's handle (`CUstream`, `cudaStream_t`), open as long as `self` lives.
    #[must_use]
    pub fn as_raw(&self) -> *mut c_void {
        self.stream.0
    }

    /// What is issued here from now on runs after `event`.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.device.wait_on(self.stream, event)
    }

    /// Waits for everything issued here so far, also after a failure of the device: what the copies in progress use may
    /// go then.
    pub fn drain(&self) {
        // What fails here has failed before.
        // SAFETY: context and stream are open.
        unsafe {
            (self.device.driver.context_set_current)(self.device.context.0);
            (self.device.driver.stream_synchronize)(self.stream.0);
        }
    }

    /// Calls `body`, whose kernels, copies within the device and fills run here. It neither allocates nor multiplies
    /// matrices, nor touches host memory.
    pub fn issue<R>(&self, body: impl FnOnce() -> R) -> R {
        /// Puts back what was there, also behind a panic.
        struct Before(Option<(*const CudaDevice, Handle)>);
        impl Drop for Before {
            fn drop(&mut self) {
                ISSUED_ON.set(self.0);
            }
        }
        let here = (Arc::as_ptr(&self.device), self.stream);
        let _before = Before(ISSUED_ON.replace(Some(here)));
        body()
    }

    /// The point after everything issued here so far.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn event(&self) -> Result<Event> {
        self.device.event_on(self.stream)
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: open, and closed nowhere else; the driver lets work in progress end.
        unsafe {
            (self.device.driver.context_set_current)(self.device.context.0);
            (self.device.driver.stream_destroy)(self.stream.0);
        }
    }
}

impl Event {
    /// Whether its stream has passed it. Does not wait.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn is_done(&self) -> Result<bool> {
        self.device.enter()?;
        // SAFETY: the event is open.
        let status = unsafe { (self.device.driver.event_query)(self.event.0) };
        if status == cu::cudaError_enum::CUDA_ERROR_NOT_READY as u32 {
            return Ok(false);
        }
        self.device.done("asking for an event", status)?;
        Ok(true)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: open, and closed nowhere else; the driver keeps it until no stream waits for it.
        unsafe {
            (self.device.driver.context_set_current)(self.device.context.0);
            (self.device.driver.event_destroy)(self.event.0);
        }
    }
}
