//! The CUDA device: context, stream, memory, kernels, matrix products, graphs.
//!
//! Everything runs in order on one stream per device, so no operation waits for another one here,
//! and memory freed is safe to reuse by what comes later. As in CUDA itself the first failure
//! sticks: every later call returns it, and helpers that cannot fail leave it for the next call that
//! can. Libraries are opened when a device is, never before ([`set_library_directory`]).

mod ahead;
mod bindings;
mod cache;
mod compiler;
pub(crate) mod convert;
mod error;
mod gemm;
mod graph;
mod launch;
mod library;
mod memory;
mod pinned;
mod profile;
mod registry;
pub(crate) mod rows;
mod side_stream;
mod staging;
mod temporary;
mod tensor_map;
#[cfg(test)]
mod tests;

pub use ahead::{Origin, compile_cached, find};
pub use cache::{file_name, save, set_kernel_cache};
pub use compiler::{
    ARCHITECTURES, Compiled, KernelResources, Module, compile, version as compiler_version,
};
pub(crate) use gemm::{Gemm, Operand};
pub use gemm::{GemmRecord, GemmTuning, WORKSPACE as GEMM_WORKSPACE};
pub use graph::{Captured, Graph};
pub(crate) use launch::Grid;
pub use library::{
    Opened as OpenedLibrary, Wanted as WantedLibrary, open as open_library, set_library_directory,
};
pub use memory::Memory;
pub(crate) use memory::Pitch;
pub use pinned::PinnedMemory;
pub use profile::LaunchTime;
pub use registry::modules;
pub use side_stream::{Event, SideStream};
pub(crate) use tensor_map::{BoxedTensor, TensorMap};

use crate::{Error, Result};
use bindings::{Driver, Raw};
use cudarc::driver::sys as cu;
use std::ffi::{c_char, c_int, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Oldest compute capability: bf16 tensor cores and asynchronous copies.
const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// A handle of the driver, which any thread may use while the context is current there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handle(pub(crate) Raw);

// SAFETY: handles of the driver API are plain names; the API itself is thread-safe.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Memory of a device in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Not allocated by anybody.
    pub free: usize,
    /// Of the whole device.
    pub total: usize,
}

/// A GPU with one stream, on which operations run in the order they are issued.
pub struct CudaDevice {
    driver: &'static Driver,
    ordinal: usize,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    device: c_int,
    pool: Handle,
    context: Handle,
    stream: Handle,
    failed: AtomicBool,
    first_error: Mutex<Option<Error>>,
    launches: AtomicU64,
    allocations: AtomicU64,
    waits: AtomicU64,
    staging: Mutex<staging::Staging>,
    modules: launch::Modules,
    gemms: gemm::Gemms,
    capture: graph::Capture,
    temporaries: temporary::Temporaries,
    profile: profile::Profile,
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaDevice({}: {})", self.ordinal, self.name)
    }
}

/// Number of GPUs that the driver shows to this process.
///
/// # Errors
/// If there is no driver, or it is too old.
pub fn device_count() -> Result<usize> {
    let driver = library::driver()?;
    let mut count: c_int = 0;
    // SAFETY: the pointer is valid for one c_int.
    let status = unsafe { (driver.device_count)(&mut count) };
    error::driver(driver, "counting GPUs", status)?;
    Ok(usize::try_from(count).unwrap_or(0))
}

impl CudaDevice {
    /// Opens GPU number `ordinal` of those visible.
    ///
    /// # Errors
    /// Without a driver, with one older than CUDA 12, without that GPU, or if it is older than
    /// compute capability 8.0.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let driver = library::driver()?;
        let count = device_count()?;
        if ordinal >= count {
            return Err(Error::NoGpu {
                problem: format!("number {ordinal} is wanted, {count} are visible"),
                fix: "check CUDA_VISIBLE_DEVICES and the number of ranks per machine".into(),
            });
        }
        let facts = Facts::of(driver, ordinal)?;
        facts.check()?;
        let (device, mut context) = (facts.device, std::ptr::null_mut());
        // SAFETY: the pointer is valid for one handle; the context is released on drop.
        let status = unsafe { (driver.primary_context_retain)(&mut context, device) };
        error::driver(driver, "opening the GPU", status)?;
        let opened = Self::with_context(driver, ordinal, facts, Handle(context));
        if opened.is_err() {
            // SAFETY: retained above, and nothing of it is in use.
            unsafe { (driver.primary_context_release)(device) };
        }
        opened.map(Arc::new)
    }

    fn with_context(
        driver: &'static Driver,
        ordinal: usize,
        facts: Facts,
        context: Handle,
    ) -> Result<Self> {
        let (mut stream, mut pool) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut keep_all = u64::MAX;
        // SAFETY: pointers are valid for one handle each, and for the u64 of this attribute. The
        // pool keeps what is freed, else every synchronisation would give it back to the system.
        unsafe {
            let done = |status| error::driver(driver, "opening the GPU", status);
            done((driver.context_set_current)(context.0))?;
            done((driver.default_pool)(&mut pool, facts.device))?;
            done((driver.pool_set_attribute)(
                pool,
                cu::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as c_int,
                (&raw mut keep_all).cast::<c_void>(),
            ))?;
            done((driver.stream_create)(
                &mut stream,
                cu::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32,
            ))?;
        }
        Ok(Self {
            driver,
            ordinal,
            name: facts.name,
            capability: facts.capability,
            multiprocessors: facts.multiprocessors,
            device: facts.device,
            pool: Handle(pool),
            context,
            stream: Handle(stream),
            failed: AtomicBool::new(false),
            first_error: Mutex::new(None),
            launches: AtomicU64::new(0),
            allocations: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            staging: Mutex::default(),
            modules: launch::Modules::default(),
            gemms: gemm::Gemms::default(),
            capture: graph::Capture::default(),
            temporaries: temporary::Temporaries::default(),
            profile: profile::Profile::default(),
        })
    }

    /// Its number among the visible ones.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Its name, like `NVIDIA H100 80GB HBM3`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Major and minor compute capability.
    #[must_use]
    pub fn compute_capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Number of streaming multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Kernels, products and graphs launched so far, those recorded into a graph included.
    #[must_use]
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Allocations of device memory so far.
    #[must_use]
    pub fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Times the host has waited for the device so far.
    #[must_use]
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    fn count_launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    /// Memory that is free and that there is.
    ///
    /// # Errors
    /// The first failure of the device.
    pub fn memory_info(&self) -> Result<MemoryInfo> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are valid for one usize.
        let status = unsafe { (self.driver.memory_info)(&mut free, &mut total) };
        self.done("asking for free memory", status)?;
        Ok(MemoryInfo { free, total })
    }

    /// The first failure, if there was one.
    ///
    /// # Errors
    /// That failure.
    pub fn check(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        lock(&self.first_error)
            .as_ref()
            .map_or(Ok(()), |error| Err(error.replica()))
    }

    /// Waits for everything issued so far.
    ///
    /// # Errors
    /// The first failure of the device, also of what ran only now.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        self.waits.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the stream is open.
        let status = unsafe { (self.driver.stream_synchronize)(self.stream.0) };
        self.done("waiting for the GPU", status)
    }

    /// Refuses to go on after a failure; makes the context current on this thread.
    fn enter(&self) -> Result<()> {
        self.check()?;
        // SAFETY: the context is open.
        let status = unsafe { (self.driver.context_set_current)(self.context.0) };
        self.done("making the GPU current", status)
    }

    /// Records a failed status of the driver.
    fn done(&self, op: &str, status: u32) -> Result<()> {
        self.record(error::driver(self.driver, op, status))
    }

    /// Records a failure, if it is the first, and hands `result` on.
    pub(crate) fn record<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            lock(&self.first_error).get_or_insert_with(|| error.replica());
            self.failed.store(true, Ordering::Release);
        }
        result
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Whatever fails here has failed before, or concerns nobody any more.
        // SAFETY: every handle is open and used by nobody else: `self` is gone from all others.
        unsafe {
            (self.driver.context_set_current)(self.context.0);
            (self.driver.stream_synchronize)(self.stream.0);
            self.end_profile();
            lock(&self.staging).release(self.driver);
            if let Some(workspace) = self.gemms.release() {
                (self.driver.free_async)(workspace, self.stream.0);
            }
            self.modules.release(self.driver);
            (self.driver.stream_destroy)(self.stream.0);
            (self.driver.primary_context_release)(self.device);
        }
    }
}

/// What the driver says about a GPU before it is opened.
struct Facts {
    device: c_int,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    has_pools: bool,
}

impl Facts {
    fn of(driver: &Driver, ordinal: usize) -> Result<Self> {
        use cu::CUdevice_attribute_enum as attribute;
        let done = |status| error::driver(driver, "asking about the GPU", status);
        let device = device_handle(driver, ordinal)?;
        let mut name: [c_char; 128] = [0; 128];
        // SAFETY: the buffer is as long as said, and the driver terminates it.
        unsafe {
            done((driver.device_name)(name.as_mut_ptr(), 128, device))?;
        }
        let ask = |attribute: attribute| -> Result<u32> {
            let mut value: c_int = 0;
            // SAFETY: the pointer is valid for one c_int.
            done(unsafe { (driver.device_attribute)(&mut value, attribute as c_int, device) })?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        Ok(Self {
            device,
            // SAFETY: terminated by the driver.
            name: unsafe { library::text(name.as_ptr()) },
            capability: (
                ask(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                ask(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: ask(attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            has_pools: ask(attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0,
        })
    }

    /// Refuses a GPU that is too old or lacks memory pools.
    fn check(&self) -> Result<()> {
        let (major, minor) = self.capability;
        if self.capability < OLDEST_CAPABILITY {
            return Err(Error::NoGpu {
                problem: format!(
                    "{} has compute capability {major}.{minor}, at least 8.0 is needed",
                    self.name
                ),
                fix: "use an Ampere or newer GPU, or `device: cpu`".into(),
            });
        }
        if !self.has_pools {
            return Err(Error::NoGpu {
                problem: format!("{} offers no memory pools here", self.name),
                fix: "some virtual GPUs lack them: enable unified memory for the vGPU, or pass \
                      the whole GPU through"
                    .into(),
            });
        }
        Ok(())
    }
}

fn device_handle(driver: &Driver, ordinal: usize) -> Result<c_int> {
    let mut device: c_int = 0;
    let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    // SAFETY: the pointer is valid for one c_int.
    let status = unsafe { (driver.device_get)(&mut device, ordinal) };
    error::driver(driver, "asking for the GPU", status)?;
    Ok(device)
}

/// The value, also if a thread panicked while it held the lock: every use leaves it whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
