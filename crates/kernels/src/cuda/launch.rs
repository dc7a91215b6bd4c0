//! Launching a kernel: module, function, grid, one parameter struct.

use super::bindings::{Driver, Raw};
use super::{CudaDevice, Handle, Module, cache, error, lock};
use crate::{Error, Result};
use cudarc::driver::sys::CUfunction_attribute_enum as attribute;
use std::collections::HashMap;
use std::ffi::{CString, c_int};
use std::sync::Mutex;

/// Dynamic shared memory that every kernel may use without asking: static and dynamic together may be
/// 48 KiB, and no kernel has more than 16 of static.
const UNASKED_SHARED: u32 = 32 << 10;

/// Blocks, threads per block, and dynamic shared memory per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Blocks in x, y and z; a zero launches nothing.
    pub(crate) blocks: [u32; 3],
    /// Threads per block, in x.
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
}

impl Grid {
    /// `blocks` blocks of `threads` threads.
    pub(crate) fn new(blocks: impl Into<Blocks>, threads: u32) -> Self {
        Self {
            blocks: blocks.into().0,
            threads,
            shared: 0,
        }
    }

    /// With `bytes` of dynamic shared memory per block.
    pub(crate) fn with_shared(self, bytes: u32) -> Self {
        Self {
            shared: bytes,
            ..self
        }
    }
}

/// One to three block counts.
pub(crate) struct Blocks([u32; 3]);

impl From<u32> for Blocks {
    fn from(x: u32) -> Self {
        Self([x, 1, 1])
    }
}

impl From<[u32; 2]> for Blocks {
    fn from([x, y]: [u32; 2]) -> Self {
        Self([x, y, 1])
    }
}

impl From<[u32; 3]> for Blocks {
    fn from(blocks: [u32; 3]) -> Self {
        Self(blocks)
    }
}

/// The modules loaded on a device.
#[derive(Default)]
pub(super) struct Modules(Mutex<HashMap<&'static str, Loaded>>);

struct Loaded {
    handle: Handle,
    functions: HashMap<String, Function>,
}

#[derive(Clone, Copy)]
struct Function {
    handle: Handle,
    /// Size of the parameter struct, if the driver can tell.
    parameters: Option<usize>,
    /// Dynamic shared memory it may use.
    shared: u32,
}

impl Modules {
    /// Unloads everything.
    ///
    /// # Safety
    /// Nothing of it runs or will be launched, and the context is current.
    pub(super) unsafe fn release(&self, driver: &Driver) {
        for (_, module) in lock(&self.0).drain() {
            // SAFETY: loaded here, taken out once; the caller vouches for the rest.
            unsafe { (driver.module_unload)(module.handle.0) };
        }
    }
}

/// Bytes of the header of a 64-bit ELF file, which a cubin is.
const ELF_HEADER: usize = 64;

impl CudaDevice {
    /// Launches `kernel` of `module` with `params` as its one argument.
    ///
    /// # Errors
    /// If the module does not compile or load, has no such kernel, or the parameters have another
    /// size than it expects; the first failure of the device.
    pub(crate) fn launch<P: bytemuck::Pod>(
        &self,
        module: &'static Module,
        kernel: &str,
        grid: Grid,
        params: &P,
    ) -> Result<()> {
        self.enter()?;
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let function = self.record(self.function(module, kernel, grid.shared))?;
        if let Some(expected) = function.parameters
            && expected != size_of::<P>()
        {
            return self.record(Err(Error::Invalid {
                op: "cuda::launch",
                message: format!(
                    "{kernel} takes a struct of {expected} bytes, got {}",
                    size_of::<P>()
                ),
            }));
        }
        self.count_launch();
        let [x, y, z] = grid.blocks;
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast()];
        // SAFETY: the kernel takes one struct of this size, which the driver copies now; the caller
        // vouches for the addresses in it.
        let status = unsafe {
            (self.driver.launch_kernel)(
                function.handle.0,
                x,
                y,
                z,
                grid.threads,
                1,
                1,
                grid.shared,
                self.current().0,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        if status == 0 {
            return self.mark(|| kernel.to_owned());
        }
        self.done(&format!("launching {kernel} {grid:?}"), status)
    }

    /// Loads `module` now, so that a later launch does not wait for the compiler.
    ///
    /// # Errors
    /// If it does not compile or load.
    pub fn prepare(&self, module: &'static Module) -> Result<()> {
        self.enter()?;
        let mut modules = lock(&self.modules.0);
        self.record(self.loaded(&mut modules, module).map(|_| ()))
    }

    fn function(&self, module: &'static Module, kernel: &str, shared: u32) -> Result<Function> {
        let mut modules = lock(&self.modules.0);
        let loaded = self.loaded(&mut modules, module)?;
        if let Some(function) = loaded.functions.get(kernel)
            && shared <= function.shared
        {
            return Ok(*function);
        }
        let mut function = self.find(loaded.handle, module, kernel)?;
        if shared > UNASKED_SHARED {
            self.raise_shared(function.handle, kernel, shared)?;
            function.shared = shared;
        }
        loaded.functions.insert(kernel.to_owned(), function);
        Ok(function)
    }

    fn loaded<'m>(
        &self,
        modules: &'m mut HashMap<&'static str, Loaded>,
        module: &'static Module,
    ) -> Result<&'m mut Loaded> {
        use std::collections::hash_map::Entry;
        match modules.entry(module.name) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let handle = cache::load(self, module)?;
                Ok(entry.insert(Loaded {
                    handle,
                    functions: HashMap::new(),
                }))
            }
        }
    }

    /// Loads a cubin or PTX text; both are copied by the driver.
    pub(super) fn load_image(&self, module: &Module, image: &[u8]) -> Result<Handle> {
        let mut handle: Raw = std::ptr::null_mut();
        // PTX is text and needs its terminator. No length is told: whatever begins like a cubin is
        // read as far as the header of one.
        let mut terminated = image.to_vec();
        terminated.resize((image.len() + 1).max(ELF_HEADER), 0);
        // SAFETY: a cubin carries its own length behind a whole header, and PTX ends with the zero.
        let status = unsafe { (self.driver.module_load)(&mut handle, terminated.as_ptr().cast()) };
        let op = format!("loading the kernels of {}", module.name);
        error::driver(self.driver, &op, status)?;
        Ok(Handle(handle))
    }

    fn find(&self, loaded: Handle, module: &Module, kernel: &str) -> Result<Function> {
        let name = CString::new(kernel).map_err(|_| no_kernel(module, kernel))?;
        let mut handle: Raw = std::ptr::null_mut();
        // SAFETY: the module is loaded, the name is terminated, the pointer valid for one handle.
        let status = unsafe { (self.driver.module_function)(&mut handle, loaded.0, name.as_ptr()) };
        if status == cudarc::driver::sys::cudaError_enum::CUDA_ERROR_NOT_FOUND as u32 {
            return Err(no_kernel(module, kernel));
        }
        error::driver(self.driver, kernel, status)?;
        Ok(Function {
            handle: Handle(handle),
            parameters: self.parameter_size(handle),
            shared: UNASKED_SHARED,
        })
    }

    /// Size of the one parameter of `function`; drivers since CUDA 12.4 can tell.
    fn parameter_size(&self, function: Raw) -> Option<usize> {
        let ask = self.driver.function_parameter?;
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is loaded and the pointers are valid for one usize each.
        let status = unsafe { ask(function, 0, &mut offset, &mut size) };
        (status == 0).then_some(size)
    }

    fn raise_shared(&self, function: Handle, kernel: &str, bytes: u32) -> Result<()> {
        let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: the function is loaded.
        let status = unsafe {
            (self.driver.function_set_attribute)(
                function.0,
                attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_int,
                bytes,
            )
        };
        let op = format!("{kernel}: {bytes} bytes of dynamic shared memory");
        error::driver(self.driver, &op, status)
    }
}

fn no_kernel(module: &Module, kernel: &str) -> Error {
    Error::Invalid {
        op: "cuda::launch",
        message: format!("the module {} has no kernel {kernel:?}", module.name),
    }
}
