//! Pinned memory through which uploads go, so that their source may be reused at once.

use super::bindings::{Driver, Raw};
use super::{CudaDevice, Handle};
use crate::Result;
use cudarc::driver::sys as cu;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::atomic::Ordering;

/// Bytes of a chunk.
pub(super) const CHUNK: usize = 4 << 20;
/// Most chunks: what may be on its way before an upload waits for the stream.
const MOST_CHUNKS: usize = 16;

/// Pinned memory in chunks. The last one fills up with copies; an event says when the stream has passed
/// those of a full one, which is then used again. While the stream is behind with all of them there is
/// another, up to a limit, so that uploads of small tables do not wait for the kernels before them.
#[derive(Default)]
pub(super) struct Staging {
    chunks: VecDeque<Chunk>,
    /// Bytes taken of the last chunk.
    used: usize,
}

struct Chunk {
    base: Handle,
    passed: Handle,
}

impl Staging {
    /// A pinned copy of `rows`, back to back, `bytes` together and at most a chunk, that stays until
    /// the stream has passed the operation issued next.
    pub(super) fn stage<'b>(
        &mut self,
        device: &CudaDevice,
        rows: impl Iterator<Item = &'b [u8]>,
        bytes: usize,
    ) -> Result<*mut c_void> {
        if self.chunks.is_empty() || self.used + bytes > CHUNK {
            self.turn(device)?;
        }
        let Some(chunk) = self.chunks.back() else {
            unreachable!("the lines above have seen to a chunk");
        };
        // SAFETY: within the chunk, and behind what copies in flight read of it.
        let slot = unsafe { chunk.base.0.cast::<u8>().add(self.used) };
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

    /// Marks the end of the last chunk's copies, and goes on with one that the stream has passed.
    fn turn(&mut self, device: &CudaDevice) -> Result<()> {
        if let Some(full) = self.chunks.back() {
            // SAFETY: event and stream are open.
            let status = unsafe { (device.driver.event_record)(full.passed.0, device.stream.0) };
            device.done("marking a copy", status)?;
        }
        let is_free = |chunk: &Chunk| {
            // SAFETY: the event is open.
            unsafe { (device.driver.event_query)(chunk.passed.0) == 0 }
        };
        match self.chunks.pop_front() {
            Some(oldest) if is_free(&oldest) => self.chunks.push_back(oldest),
            Some(oldest) if self.chunks.len() + 1 >= MOST_CHUNKS => {
                device.waits.fetch_add(1, Ordering::Relaxed);
                // SAFETY: the event is open.
                let status = unsafe { (device.driver.event_synchronize)(oldest.passed.0) };
                self.chunks.push_back(oldest);
                device.done("waiting for a copy", status)?;
            }
            oldest => {
                if let Some(oldest) = oldest {
                    self.chunks.push_front(oldest);
                }
                self.chunks.push_back(Chunk::new(device)?);
            }
        }
        self.used = 0;
        Ok(())
    }

    /// Frees everything.
    ///
    /// # Safety
    /// The stream has passed every copy, and the context is current.
    pub(super) unsafe fn release(&mut self, driver: &Driver) {
        for chunk in self.chunks.drain(..) {
            // SAFETY: the caller vouches for it; each handle is taken out once.
            unsafe {
                (driver.event_destroy)(chunk.passed.0);
                (driver.host_free)(chunk.base.0);
            }
        }
    }
}

impl Chunk {
    fn new(device: &CudaDevice) -> Result<Self> {
        let (mut base, mut passed): (Raw, Raw) = (std::ptr::null_mut(), std::ptr::null_mut());
        let flags = cu::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the pointer is valid for one handle.
        let status = unsafe { (device.driver.event_create)(&mut passed, flags) };
        device.done("creating an event", status)?;
        // SAFETY: the pointer is valid for one address.
        let status = unsafe { (device.driver.host_alloc)(&mut base, CHUNK, 0) };
        if status != 0 {
            // SAFETY: created above and used by nobody.
            unsafe { (device.driver.event_destroy)(passed) };
        }
        device.done("allocating pinned host memory", status)?;
        Ok(Self {
            base: Handle(base),
            passed: Handle(passed),
        })
    }
}
