//! Pinned memory of the host for what leaves a GPU for a while and comes back.

use super::bindings::Raw;
use super::{CudaDevice, Handle, SideStream};
use crate::{Error, Result, Tensor};
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

/// Pinned memory of the host that one side stream copies to and from, in the order it is told. Nothing reads it here.
pub struct PinnedMemory {
    stream: Arc<SideStream>,
    base: Handle,
    bytes: usize,
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedMemory({} bytes, {:?})", self.bytes, self.stream)
    }
}

impl PinnedMemory {
    /// `bytes` bytes with unknown contents.
    ///
    /// # Errors
    /// If the host has not as many; the first failure of the device.
    pub fn new(stream: &Arc<SideStream>, bytes: usize) -> Result<Self> {
        let device = stream.device();
        device.enter()?;
        let mut base: Raw = std::ptr::null_mut();
        // SAFETY: the pointer is valid for one address.
        let status = unsafe { (device.driver.host_alloc)(&mut base, bytes.max(1), 0) };
        device.done(
            &format!("allocating {bytes} bytes of pinned host memory"),
            status,
        )?;
        Ok(Self {
            stream: Arc::clone(stream),
            base: Handle(base),
            bytes,
        })
    }

    /// Bytes there are.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `tensor` to the bytes from `at`, on the side stream. It must stay as it is until that has passed.
    ///
    /// # Errors
    /// If `tensor` is not on the stream's device or has more bytes than there are; the first failure of the device.
    pub fn store(&self, at: usize, tensor: &Tensor) -> Result<()> {
        let (host, address) = self.ends(at, tensor)?;
        if tensor.bytes() == 0 {
            return Ok(());
        }
        let (device, stream) = (self.stream.device(), self.stream.as_raw());
        // SAFETY: `host` has that many bytes, which stay until the stream has passed; the caller vouches for the tensor.
        let status =
            unsafe { (device.driver.copy_to_host_async)(host, address, tensor.bytes(), stream) };
        device.done("copying to pinned host memory", status)
    }

    /// Copies the bytes from `at` to `tensor`, on the side stream. Nothing else may use it until that has passed.
    ///
    /// # Errors
    /// As [`PinnedMemory::store`].
    pub fn load(&self, at: usize, tensor: &mut Tensor) -> Result<()> {
        let (host, address) = self.ends(at, tensor)?;
        if tensor.bytes() == 0 {
            return Ok(());
        }
        let (device, stream) = (self.stream.device(), self.stream.as_raw());
        // SAFETY: as in `store`.
        let status =
            unsafe { (device.driver.copy_to_device_async)(address, host, tensor.bytes(), stream) };
        device.done("copying from pinned host memory", status)
    }

    /// Where the bytes of `tensor` are here and on the device.
    fn ends(&self, at: usize, tensor: &Tensor) -> Result<(*mut c_void, u64)> {
        let device = self.stream.device();
        device.enter()?;
        let wrong = |message: String| {
            let op = "cuda::pinned";
            Err(Error::Invalid { op, message })
        };
        if at + tensor.bytes() > self.bytes {
            return wrong(format!(
                "bytes {at} to {} of {}",
                at + tensor.bytes(),
                self.bytes
            ));
        }
        let view = tensor.view();
        match view.device() {
            Some(of) if Arc::ptr_eq(of, device) => {}
            _ => return wrong("a matrix of another device".into()),
        }
        // SAFETY: `at` is within the allocation, or one behind it.
        let host = unsafe { self.base.0.cast::<u8>().add(at) };
        Ok((host.cast(), view.ptr()))
    }
}

impl Drop for PinnedMemory {
    /// Waits for copies in progress, also those of a graph.
    fn drop(&mut self) {
        let device: &CudaDevice = self.stream.device();
        // What fails here has failed before.
        // SAFETY: context and streams are open; the memory is freed once, and no copy is in progress.
        unsafe {
            (device.driver.context_set_current)(device.context.0);
            (device.driver.stream_synchronize)(self.stream.as_raw());
            (device.driver.stream_synchronize)(device.stream.0);
            (device.driver.host_free)(self.base.0);
        }
    }
}
