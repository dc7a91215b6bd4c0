//! Device memory: allocation and freeing in stream order, copies, zero fill.

use super::staging::CHUNK;
use super::{CudaDevice, error, lock, temporary};
use crate::{Error, Result};
use cudarc::driver::sys as cu;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// An allocation on a device, aligned to 256 bytes; freed on drop, in stream order.
pub struct Memory {
    device: Arc<CudaDevice>,
    ptr: u64,
    bytes: usize,
    /// Where it goes back to, if it is a graph's.
    pool: Option<Arc<temporary::Pool>>,
}

impl Memory {
    /// Device address of the first byte; 0 if there are none, or if the allocation failed.
    #[must_use]
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Bytes asked for.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device it lies on.
    #[must_use]
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} bytes on {:?})", self.bytes, self.device)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.pool {
            _ if self.ptr == 0 => {}
            Some(pool) => pool.give(self.bytes, self.ptr),
            None if self.device.capture.defer_free(self.ptr) => {}
            None => self.device.free(self.ptr),
        }
    }
}

/// A rectangle in host or device memory: bytes from one row to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pitch {
    /// Rows to copy.
    pub(crate) rows: usize,
    /// Bytes of a row to copy.
    pub(crate) row_bytes: usize,
    /// Bytes between rows of the source.
    pub(crate) src: usize,
    /// Bytes between rows of the destination.
    pub(crate) dst: usize,
}

impl Pitch {
    /// One row.
    pub(crate) fn row(bytes: usize) -> Self {
        Self {
            rows: 1,
            row_bytes: bytes,
            src: bytes,
            dst: bytes,
        }
    }

    fn is_empty(&self) -> bool {
        self.rows == 0 || self.row_bytes == 0
    }

    /// Whether all rows lie back to back at both ends. The driver limits pitches, not lengths.
    fn is_linear(&self) -> bool {
        self.rows == 1 || (self.src == self.row_bytes && self.dst == self.row_bytes)
    }

    /// Bytes from the first to the last byte copied, `pitch` apart.
    fn extent(&self, pitch: usize) -> usize {
        if self.is_empty() {
            0
        } else {
            (self.rows - 1) * pitch + self.row_bytes
        }
    }
}

impl CudaDevice {
    /// `bytes` bytes of device memory with unknown contents. On failure the error sticks to the
    /// device and the address is 0.
    pub fn alloc(self: &Arc<Self>, bytes: usize) -> Memory {
        let ptr = if bytes == 0 {
            0
        } else {
            self.try_alloc(bytes).unwrap_or(0)
        };
        Memory {
            device: Arc::clone(self),
            ptr,
            bytes,
            pool: None,
        }
    }

    /// [`CudaDevice::alloc`] for what is written, read and dropped within one pass: it may be recorded.
    pub fn alloc_temporary(self: &Arc<Self>, bytes: usize) -> Memory {
        let Some(pool) = self.capture.pool().filter(|_| bytes > 0) else {
            return self.alloc(bytes);
        };
        Memory {
            device: Arc::clone(self),
            ptr: self.enter().and_then(|()| pool.take(bytes)).unwrap_or(0),
            bytes,
            pool: Some(pool),
        }
    }

    pub(super) fn try_alloc(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        self.on_own_stream("allocation")?;
        if self.capture.is_active() {
            return self.record(Err(Error::Invalid {
                op: "cuda::alloc",
                message: "memory cannot be allocated while a graph is captured".into(),
            }));
        }
        self.allocations.fetch_add(1, Ordering::Relaxed);
        let allocate = || {
            let mut ptr = 0;
            // SAFETY: the pointer is valid for one address; the stream is open.
            let status = unsafe { (self.driver.alloc_async)(&mut ptr, bytes, self.stream.0) };
            (status, ptr)
        };
        let (mut status, mut ptr) = allocate();
        if error::is_out_of_memory(status) {
            // What was freed lies in the pool in pieces; given back, it may fit in one.
            // SAFETY: stream and pool are open.
            unsafe {
                (self.driver.stream_synchronize)(self.stream.0);
                (self.driver.pool_trim_to)(self.pool.0, 0);
            }
            (status, ptr) = allocate();
        }
        if error::is_out_of_memory(status) {
            let info = self.memory_info();
            return self.record(Err(Error::OutOfMemory {
                wanted: bytes,
                free: info.as_ref().map_or(0, |info| info.free),
                total: info.as_ref().map_or(0, |info| info.total),
            }));
        }
        self.done("allocating memory", status)?;
        Ok(ptr)
    }

    /// Frees after everything issued so far.
    pub(super) fn free(&self, ptr: u64) {
        // Also after a failure: the driver then refuses, which changes nothing.
        // SAFETY: `ptr` came from `alloc_async` and is given up by its only owner.
        unsafe {
            (self.driver.context_set_current)(self.context.0);
            (self.driver.free_async)(ptr, self.stream.0);
        }
    }

    /// Copies to the device. `bytes` may be reused on return.
    ///
    /// # Errors
    /// The first failure of the device; a capture in progress.
    pub(crate) fn upload(&self, dst: u64, bytes: &[u8]) -> Result<()> {
        self.upload_2d(dst, bytes, Pitch::row(bytes.len()))
    }

    /// Copies a rectangle to the device. `bytes` starts with its first byte and may be reused on
    /// return.
    ///
    /// # Errors
    /// If `bytes` is too short; the first failure of the device; a capture in progress.
    pub(crate) fn upload_2d(&self, dst: u64, bytes: &[u8], pitch: Pitch) -> Result<()> {
        self.enter()?;
        if pitch.is_empty() {
            return Ok(());
        }
        self.not_capturing("upload")?;
        check_extent("cuda::upload", bytes.len(), pitch.extent(pitch.src))?;
        let mut staging = lock(&self.staging);
        if pitch.row_bytes > CHUNK {
            for row in 0..pitch.rows {
                let start = row * pitch.src;
                let mut to = dst + (row * pitch.dst) as u64;
                for piece in bytes[start..start + pitch.row_bytes].chunks(CHUNK) {
                    let from = staging.stage(self, std::iter::once(piece), piece.len())?;
                    self.copy_staged(to, from, Pitch::row(piece.len()))?;
                    to += piece.len() as u64;
                }
            }
            return Ok(());
        }
        let together = CHUNK / pitch.row_bytes;
        for first in (0..pitch.rows).step_by(together) {
            let rows = together.min(pitch.rows - first);
            let row = |r: usize| &bytes[(first + r) * pitch.src..][..pitch.row_bytes];
            let from = staging.stage(self, (0..rows).map(row), rows * pitch.row_bytes)?;
            let packed = Pitch {
                rows,
                src: pitch.row_bytes,
                ..pitch
            };
            self.copy_staged(dst + (first * pitch.dst) as u64, from, packed)?;
        }
        Ok(())
    }

    /// Copies from pinned memory, which is not written again before the stream has passed.
    fn copy_staged(&self, dst: u64, src: *mut c_void, pitch: Pitch) -> Result<()> {
        self.copy_rectangle(End::Device(dst), End::Host(src), pitch)
    }

    /// Copies to the host, after everything issued so far.
    ///
    /// # Errors
    /// The first failure of the device; a capture in progress.
    pub(crate) fn download(&self, dst: &mut [u8], src: u64) -> Result<()> {
        self.enter()?;
        if dst.is_empty() {
            return Ok(());
        }
        self.not_capturing("download")?;
        // SAFETY: `dst` is valid for its length and borrowed until the stream is done with it.
        let status = unsafe {
            (self.driver.copy_to_host_async)(dst.as_mut_ptr().cast(), src, dst.len(), self.stream.0)
        };
        self.done("copying from the GPU", status)?;
        self.synchronize()
    }

    /// Copies a rectangle to the host, after everything issued so far. `dst` starts with its first
    /// byte; what lies between its rows stays.
    ///
    /// # Errors
    /// If `dst` is too short; the first failure of the device; a capture in progress.
    pub(crate) fn download_2d(&self, dst: &mut [u8], src: u64, pitch: Pitch) -> Result<()> {
        self.enter()?;
        if pitch.is_empty() {
            return Ok(());
        }
        if pitch.is_linear() {
            return self.download(first_bytes(dst, pitch.rows * pitch.row_bytes)?, src);
        }
        self.not_capturing("download")?;
        check_extent("cuda::download", dst.len(), pitch.extent(pitch.dst))?;
        self.copy_rectangle(End::Host(dst.as_mut_ptr().cast()), End::Device(src), pitch)?;
        self.synchronize()
    }

    /// Copies within the device. The ranges must not overlap.
    ///
    /// # Errors
    /// The first failure of the device.
    pub(crate) fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller vouches for both ranges.
        let status =
            unsafe { (self.driver.copy_on_device_async)(dst, src, bytes, self.current().0) };
        self.done("copying on the GPU", status)?;
        self.mark(|| "copy".to_owned())
    }

    /// Copies a rectangle within the device.
    ///
    /// # Errors
    /// The first failure of the device.
    pub(crate) fn copy_2d(&self, dst: u64, src: u64, pitch: Pitch) -> Result<()> {
        self.enter()?;
        if pitch.is_empty() {
            return Ok(());
        }
        if pitch.is_linear() {
            return self.copy(dst, src, pitch.rows * pitch.row_bytes);
        }
        self.copy_rectangle(End::Device(dst), End::Device(src), pitch)
    }

    /// Sets bytes to zero.
    ///
    /// # Errors
    /// The first failure of the device.
    pub(crate) fn fill_zero(&self, dst: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller vouches for the range.
        let status = unsafe { (self.driver.fill_bytes_async)(dst, 0, bytes, self.current().0) };
        self.done("filling with zeros", status)?;
        self.mark(|| "zeros".to_owned())
    }

    fn copy_rectangle(&self, dst: End, src: End, pitch: Pitch) -> Result<()> {
        // The driver refuses pitches below the width, which one row may have.
        let single = pitch.rows == 1;
        let wide = |pitch_bytes: usize| if single { pitch.row_bytes } else { pitch_bytes };
        let copy = cu::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: src.kind(),
            srcHost: src.host(),
            srcDevice: src.device(),
            srcArray: std::ptr::null_mut(),
            srcPitch: wide(pitch.src),
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: dst.kind(),
            dstHost: dst.host(),
            dstDevice: dst.device(),
            dstArray: std::ptr::null_mut(),
            dstPitch: wide(pitch.dst),
            WidthInBytes: pitch.row_bytes,
            Height: pitch.rows,
        };
        // SAFETY: extents of host memory are checked by the callers, who also wait; device ranges
        // are vouched for by theirs.
        let status = unsafe { (self.driver.copy_2d_async)(&copy, self.current().0) };
        self.done("copying a matrix", status)?;
        self.mark(|| "copy of a matrix".to_owned())
    }

    /// Whether something goes from or to the host: not while a graph is captured, nor on a side stream.
    fn not_capturing(&self, what: &str) -> Result<()> {
        self.on_own_stream(what)?;
        if self.capture.is_active() {
            return self.record(Err(Error::Invalid {
                op: "cuda",
                message: format!("no {what} while a graph is captured"),
            }));
        }
        Ok(())
    }
}

/// One end of a copy.
#[derive(Clone, Copy)]
enum End {
    Host(*mut c_void),
    Device(u64),
}

impl End {
    fn kind(self) -> cu::CUmemorytype {
        match self {
            Self::Host(_) => cu::CUmemorytype::CU_MEMORYTYPE_HOST,
            Self::Device(_) => cu::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        }
    }

    fn host(self) -> *mut c_void {
        match self {
            Self::Host(ptr) => ptr,
            Self::Device(_) => std::ptr::null_mut(),
        }
    }

    fn device(self) -> u64 {
        match self {
            Self::Host(_) => 0,
            Self::Device(ptr) => ptr,
        }
    }
}

fn first_bytes(bytes: &mut [u8], length: usize) -> Result<&mut [u8]> {
    check_extent("cuda::download", bytes.len(), length)?;
    Ok(&mut bytes[..length])
}

fn check_extent(op: &'static str, got: usize, expected: usize) -> Result<()> {
    if got >= expected {
        Ok(())
    } else {
        Err(Error::Length {
            op,
            what: "host bytes",
            expected,
            got,
        })
    }
}
