//! How long each launch takes, for whoever looks for what is slow.
//!
//! One event is recorded after each launch. As long as the host is ahead of the GPU, the time between two
//! of them is the time of the launch between, and about a microsecond.

use super::bindings::Raw;
use super::{CudaDevice, Handle, error, lock};
use crate::Result;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Launches of one name in a profile.
#[derive(Clone, Debug, PartialEq)]
pub struct LaunchTime {
    /// The kernel, or the product and its shape.
    pub name: String,
    /// How often it was launched.
    pub calls: usize,
    /// Of all of them together.
    pub milliseconds: f64,
}

/// The profile in progress, if there is one.
#[derive(Default)]
pub(super) struct Profile {
    active: AtomicBool,
    marks: Mutex<Vec<(String, Handle)>>,
}

impl CudaDevice {
    /// Times every launch from now on. A graph counts as one launch; what is recorded into one is not timed.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn start_profile(&self) -> Result<()> {
        self.enter()?;
        self.end_profile();
        self.profile.active.store(true, Ordering::Release);
        self.mark(String::new)
    }

    /// Ends the profile and returns what was launched, longest first; nothing if none was started.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn take_profile(&self) -> Result<Vec<LaunchTime>> {
        self.synchronize()?;
        self.profile.active.store(false, Ordering::Release);
        let times = self.times(&lock(&self.profile.marks));
        self.end_profile();
        self.record(times)
    }

    /// Notes that something called `name` was just launched.
    pub(super) fn mark(&self, name: impl FnOnce() -> String) -> Result<()> {
        let active = self.profile.active.load(Ordering::Acquire);
        if !active || self.capture.is_active() || self.current() != self.stream {
            return Ok(());
        }
        let mut event: Raw = std::ptr::null_mut();
        // SAFETY: the pointer is valid for one handle.
        let status = unsafe { (self.driver.event_create)(&mut event, 0) };
        self.done("creating an event", status)?;
        lock(&self.profile.marks).push((name(), Handle(event)));
        // SAFETY: event and stream are open.
        let status = unsafe { (self.driver.event_record)(event, self.stream.0) };
        self.done("marking the time", status)
    }

    fn times(&self, marks: &[(String, Handle)]) -> Result<Vec<LaunchTime>> {
        let mut found: HashMap<&str, (usize, f64)> = HashMap::new();
        for pair in marks.windows(2) {
            let mut milliseconds = 0.0;
            let [from, to] = [pair[0].1.0, pair[1].1.0];
            // SAFETY: both events are recorded and passed; the pointer is valid for one f32.
            let status = unsafe { (self.driver.event_elapsed)(&mut milliseconds, from, to) };
            error::driver(self.driver, "reading the time", status)?;
            let entry = found.entry(&pair[1].0).or_default();
            *entry = (entry.0 + 1, entry.1 + f64::from(milliseconds));
        }
        let time = |(name, (calls, milliseconds)): (&str, _)| LaunchTime {
            name: name.to_owned(),
            calls,
            milliseconds,
        };
        let mut times: Vec<LaunchTime> = found.into_iter().map(time).collect();
        times.sort_by(|a, b| {
            let longest_first = b.milliseconds.total_cmp(&a.milliseconds);
            longest_first.then_with(|| a.name.cmp(&b.name))
        });
        Ok(times)
    }

    /// Closes the events of a profile, which are done or never awaited.
    pub(super) fn end_profile(&self) {
        for (_, event) in lock(&self.profile.marks).drain(..) {
            // SAFETY: open, taken out once; the driver waits for what is pending.
            unsafe { (self.driver.event_destroy)(event.0) };
        }
    }
}
