//! Time on the stream.

use super::super::bindings::Raw;
use super::super::{CudaDevice, error};
use crate::Result;

/// Two events around work on the stream.
pub(super) struct Timer<'a> {
    device: &'a CudaDevice,
    events: [Raw; 2],
}

impl<'a> Timer<'a> {
    pub(super) fn start(device: &'a CudaDevice) -> Result<Self> {
        let mut timer = Self {
            device,
            events: [std::ptr::null_mut(); 2],
        };
        for event in &mut timer.events {
            // SAFETY: the pointer is valid for one handle.
            let status = unsafe { (device.driver.event_create)(event, 0) };
            error::driver(device.driver, "creating an event", status)?;
        }
        timer.mark(0)?;
        Ok(timer)
    }

    fn mark(&self, which: usize) -> Result<()> {
        let stream = self.device.stream.0;
        // SAFETY: event and stream are open.
        let status = unsafe { (self.device.driver.event_record)(self.events[which], stream) };
        error::driver(self.device.driver, "marking the time", status)
    }

    /// Milliseconds since the start.
    pub(super) fn stop(self) -> Result<f32> {
        self.mark(1)?;
        let mut milliseconds = 0.0;
        let driver = self.device.driver;
        // SAFETY: both events are recorded; the pointer is valid for one f32.
        let status = unsafe {
            match (driver.event_synchronize)(self.events[1]) {
                0 => (driver.event_elapsed)(&mut milliseconds, self.events[0], self.events[1]),
                failed => failed,
            }
        };
        error::driver(driver, "reading the time", status)?;
        Ok(milliseconds)
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        for event in self.events.iter().filter(|event| !event.is_null()) {
            // SAFETY: open, and closed nowhere else.
            unsafe { (self.device.driver.event_destroy)(*event) };
        }
    }
}
