//! Pinned memory through which uploads go, so that their source may be reused at once.

use super::bindings::{Driver, Raw};
use super::{CudaDevice, Handle};
use crate::Result;
use cudarc::driver::sys as cu;
use std::ffi::c_void;

/// Half of the buffer.
pub(super) const HALF: usize = 4 << 20;

/// Pinned memory in two halves. One fills up with copies while the stream works through the other;
/// an event says when a half may be written again.
#[derive(Default)]
pub(super) struct Staging {
    base: Option<Handle>,
    events: [Option<Handle>; 2],
    half: usize,
    used: usize,
}

impl Staging {
    /// A pinned copy of `rows`, back to back, `bytes` together and at most half the buffer, that
    /// stays until the stream has passed the operation issued next.
    pub(super) fn stage<'b>(
        &mut self,
        device: &CudaDevice,
        rows: impl Iterator<Item = &'b [u8]>,
        bytes: usize,
    ) -> Result<*mut c_void> {
        let base = self.open(device)?;
        if self.used + bytes > HALF {
            self.turn(device)?;
        }
        // SAFETY: within the buffer, and in the half that no copy in flight reads: `turn` waited.
        let slot = unsafe { base.cast::<u8>().add(self.half * HALF + self.used) };
        let mut end = slot;
        for row in rows {
            // SAFETY: `bytes` are free from `slot` on, and the rows have no more together.
            unsafe {
                end.copy_from_nonoverlapping(row.as_ptr(), row.len());
                end = end.add(row.len());
            }
        }
        self.used += bytes.next_multiple_of(16);
        Ok(slot.cast())
    }

    /// Marks the end of this half's copies and waits for those of the other.
    fn turn(&mut self, device: &CudaDevice) -> Result<()> {
        if let Some(event) = self.events[self.half] {
            // SAFETY: event and stream are open.
            let status = unsafe { (device.driver.event_record)(event.0, device.stream.0) };
            device.done("marking a copy", status)?;
        }
        self.half = 1 - self.half;
        self.used = 0;
        if let Some(event) = self.events[self.half] {
            // SAFETY: the event is open. One never recorded counts as passed.
            let status = unsafe { (device.driver.event_synchronize)(event.0) };
            device.done("waiting for a copy", status)?;
        }
        Ok(())
    }

    fn open(&mut self, device: &CudaDevice) -> Result<Raw> {
        if let Some(base) = self.base {
            return Ok(base.0);
        }
        let mut base = std::ptr::null_mut();
        // SAFETY: the pointer is valid for one address.
        let status = unsafe { (device.driver.host_alloc)(&mut base, 2 * HALF, 0) };
        device.done("allocating pinned host memory", status)?;
        self.base = Some(Handle(base));
        for event in &mut self.events {
            let mut handle = std::ptr::null_mut();
            let flags = cu::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: the pointer is valid for one handle.
            let status = unsafe { (device.driver.event_create)(&mut handle, flags) };
            device.done("creating an event", status)?;
            *event = Some(Handle(handle));
        }
        Ok(base)
    }

    /// Frees everything.
    ///
    /// # Safety
    /// The stream has passed every copy, and the context is current.
    pub(super) unsafe fn release(&mut self, driver: &Driver) {
        // SAFETY: the caller vouches for it; each handle is taken out once.
        unsafe {
            for event in self.events.iter_mut().filter_map(Option::take) {
                (driver.event_destroy)(event.0);
            }
            if let Some(base) = self.base.take() {
                (driver.host_free)(base.0);
            }
        }
    }
}
