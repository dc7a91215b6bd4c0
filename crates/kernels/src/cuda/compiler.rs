//! NVRTC: kernel source and headers to a cubin, without a GPU and without a toolkit.

use super::bindings::{Nvrtc, Raw};
use super::{error, library};
use crate::{Error, Result};
use std::ffi::{CString, c_char, c_int};

/// Kernels that are compiled and loaded together.
#[derive(Debug)]
pub struct Module {
    /// Name of the operation.
    pub name: &'static str,
    /// CUDA C++ source, which includes only the headers beside it.
    pub source: &'static str,
}

/// Architectures kernels are compiled for, by compute capability, oldest first. A cubin of one runs
/// on devices of the same major and the same or a newer minor version; `a` means that version alone.
pub const ARCHITECTURES: [(&str, (u32, u32)); 6] = [
    ("sm_80", (8, 0)),
    ("sm_86", (8, 6)),
    ("sm_89", (8, 9)),
    ("sm_90a", (9, 0)),
    ("sm_100a", (10, 0)),
    ("sm_120a", (12, 0)),
];

/// What a module may include, by name.
pub(super) static HEADERS: &[(&str, &str)] = &[
    ("types.cuh", include_str!("include/types.cuh")),
    ("ptx.cuh", include_str!("include/ptx.cuh")),
    ("reduce.cuh", include_str!("include/reduce.cuh")),
    ("philox.cuh", include_str!("include/philox.cuh")),
    ("rows.cuh", include_str!("include/rows.cuh")),
    ("spans.cuh", include_str!("include/spans.cuh")),
    ("columns.cuh", include_str!("include/columns.cuh")),
    ("convert.cuh", include_str!("include/convert.cuh")),
    ("wgmma.cuh", include_str!("include/wgmma.cuh")),
    ("tma.cuh", include_str!("include/tma.cuh")),
];

/// Flags of every compilation, beside the architecture.
pub(super) const FLAGS: [&str; 2] = ["-std=c++17", "--ptxas-options=-v"];

/// A compiled module.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The cubin, or PTX text where the architecture starts with `compute_`.
    pub cubin: Vec<u8>,
    /// What each kernel takes of a multiprocessor.
    pub resources: Vec<KernelResources>,
    /// Everything the compiler said.
    pub log: String,
}

impl Compiled {
    pub(super) fn new(cubin: Vec<u8>, log: String) -> Self {
        let resources = parse_resources(&log);
        Self {
            cubin,
            resources,
            log,
        }
    }
}

/// What one kernel takes of a multiprocessor, as ptxas reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelResources {
    /// Name of the kernel.
    pub kernel: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes per thread stored to memory for want of registers.
    pub spill_stores: u32,
    /// Bytes per thread read back from there.
    pub spill_loads: u32,
    /// Bytes of stack per thread.
    pub stack: u32,
    /// Bytes of static shared memory per block.
    pub shared: u32,
}

/// What a device of `capability` can run, best first: cubins by architecture, newest first, then
/// PTX, which the driver finishes.
pub(super) fn architectures(capability: (u32, u32)) -> Vec<String> {
    let runs = |name: &str, of: (u32, u32)| {
        if name.ends_with('a') {
            of == capability
        } else {
            of.0 == capability.0 && of.1 <= capability.1
        }
    };
    let newest_first = || ARCHITECTURES.iter().rev();
    let cubins = newest_first()
        .filter(|(name, of)| runs(name, *of))
        .map(|(name, _)| (*name).to_owned());
    // PTX of an `a` architecture runs nowhere else, so the plain one of that number.
    let ptx = newest_first()
        .filter(|(_, of)| *of <= capability)
        .map(|(_, (major, minor))| format!("compute_{major}{minor}"));
    cubins.chain(ptx).collect()
}

/// The best of [`architectures`] that the compiler knows.
///
/// # Errors
/// If there is no compiler, or it knows none of them.
pub(super) fn architecture(capability: (u32, u32)) -> Result<String> {
    let known = known(library::nvrtc()?);
    let number = |arch: &str| -> Option<i32> {
        let digits = arch.trim_start_matches(|c: char| !c.is_ascii_digit());
        digits.trim_end_matches('a').parse().ok()
    };
    let mut best = architectures(capability).into_iter();
    best.find(|arch| known.is_empty() || number(arch).is_some_and(|n| known.contains(&n)))
        .ok_or_else(|| Error::Library {
            library: "libnvrtc".into(),
            problem: format!("compiles for none of what compute capability {capability:?} runs"),
            fix: "install one of a newer CUDA version".into(),
        })
}

/// Architectures the compiler knows, as in `sm_80`; empty if it cannot tell.
fn known(nvrtc: &Nvrtc) -> Vec<c_int> {
    let (Some(count), Some(list)) = (nvrtc.arch_count, nvrtc.archs) else {
        return Vec::new();
    };
    let mut length: c_int = 0;
    // SAFETY: the pointer is valid for one c_int.
    if unsafe { count(&mut length) } != 0 {
        return Vec::new();
    }
    let mut known = vec![0; usize::try_from(length).unwrap_or(0)];
    // SAFETY: the array is as long as the library asked for.
    if unsafe { list(known.as_mut_ptr()) } != 0 {
        return Vec::new();
    }
    known
}

/// Compiles `module` for `arch`, like `sm_90a`, or `compute_90` for PTX.
///
/// # Errors
/// If there is no compiler, or the source does not compile: [`Error::Compile`] with the log.
pub fn compile(module: &Module, arch: &str) -> Result<Compiled> {
    compile_with(library::nvrtc()?, module, arch)
}

/// Version of the compiler, `(13, 0)` for that of CUDA 13.0; part of every cache key.
///
/// # Errors
/// If there is no compiler.
pub fn version() -> Result<(i32, i32)> {
    let nvrtc = library::nvrtc()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are valid for one c_int.
    let status = unsafe { (nvrtc.version)(&mut major, &mut minor) };
    error::nvrtc(nvrtc, "asking for the compiler's version", status)?;
    Ok((major, minor))
}

fn compile_with(nvrtc: &Nvrtc, module: &Module, arch: &str) -> Result<Compiled> {
    let program = Program::new(nvrtc, module)?;
    let mut options = vec![format!("--gpu-architecture={arch}")];
    options.extend(FLAGS.iter().map(|&flag| flag.to_owned()));
    let options = c_strings(options)?;
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: the program is open and the options are terminated.
    let status =
        unsafe { (nvrtc.compile_program)(program.raw, length(&pointers), pointers.as_ptr()) };
    let log = program.log()?;
    // Also for other failures the log says most, if there is one.
    if status != 0 && !log.is_empty() {
        return Err(Error::Compile {
            module: module.name,
            arch: arch.to_owned(),
            log,
        });
    }
    let op = format!("compiling {} for {arch}", module.name);
    error::nvrtc(nvrtc, &op, status)?;
    let cubin = if arch.starts_with("compute_") {
        program.bytes(nvrtc.ptx_size, nvrtc.ptx)?
    } else {
        program.bytes(nvrtc.cubin_size, nvrtc.cubin)?
    };
    Ok(Compiled::new(cubin, log))
}

/// An open NVRTC program.
struct Program<'a> {
    nvrtc: &'a Nvrtc,
    raw: Raw,
}

impl<'a> Program<'a> {
    fn new(nvrtc: &'a Nvrtc, module: &Module) -> Result<Self> {
        let text = c_strings([module.source.to_owned(), format!("{}.cu", module.name)])?;
        let headers = c_strings(HEADERS.iter().map(|(_, text)| (*text).to_owned()))?;
        let names = c_strings(HEADERS.iter().map(|(name, _)| (*name).to_owned()))?;
        let headers: Vec<*const c_char> = headers.iter().map(|header| header.as_ptr()).collect();
        let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let mut raw = std::ptr::null_mut();
        // SAFETY: every string is terminated and lives through the call, which copies them.
        let status = unsafe {
            (nvrtc.create_program)(
                &mut raw,
                text[0].as_ptr(),
                text[1].as_ptr(),
                length(&headers),
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        error::nvrtc(nvrtc, "starting the compiler", status)?;
        Ok(Self { nvrtc, raw })
    }

    fn log(&self) -> Result<String> {
        let mut log = self.bytes(self.nvrtc.log_size, self.nvrtc.log)?;
        while log.last() == Some(&0) {
            log.pop();
        }
        Ok(String::from_utf8_lossy(&log).trim().to_owned())
    }

    /// A result of the program: its size, then its bytes.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Raw, *mut usize) -> u32,
        read: unsafe extern "C" fn(Raw, *mut c_char) -> u32,
    ) -> Result<Vec<u8>> {
        let op = "reading what the compiler made";
        let mut bytes = 0;
        // SAFETY: the program is open and the pointer valid for one usize.
        error::nvrtc(self.nvrtc, op, unsafe { size(self.raw, &mut bytes) })?;
        let mut result = vec![0_u8; bytes];
        // SAFETY: the buffer has the length the library asked for.
        let status = unsafe { read(self.raw, result.as_mut_ptr().cast()) };
        error::nvrtc(self.nvrtc, op, status)?;
        Ok(result)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: open, and closed nowhere else.
        unsafe { (self.nvrtc.destroy_program)(&mut self.raw) };
    }
}

fn c_strings(texts: impl IntoIterator<Item = String>) -> Result<Vec<CString>> {
    texts
        .into_iter()
        .map(|text| {
            CString::new(text).map_err(|_| Error::Invalid {
                op: "cuda::compile",
                message: "a source or a flag has a zero byte".into(),
            })
        })
        .collect()
}

fn length<T>(items: &[T]) -> c_int {
    c_int::try_from(items.len()).unwrap_or(c_int::MAX)
}

/// Reads what `--ptxas-options=-v` adds to the log, three lines per kernel:
/// `Compiling entry function 'NAME' for 'sm_80'`, `0 bytes stack frame, ... spill loads`,
/// `Used 32 registers, ..., 128 bytes smem`.
fn parse_resources(log: &str) -> Vec<KernelResources> {
    let mut kernels: Vec<KernelResources> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(KernelResources {
                kernel,
                registers: 0,
                spill_stores: 0,
                spill_loads: 0,
                stack: 0,
                shared: 0,
            });
        } else if let Some(kernel) = kernels.last_mut() {
            for part in line.split(',') {
                let value = before(part);
                match part {
                    p if p.contains("bytes stack frame") => kernel.stack = value,
                    p if p.contains("bytes spill stores") => kernel.spill_stores = value,
                    p if p.contains("bytes spill loads") => kernel.spill_loads = value,
                    p if p.contains("registers") => kernel.registers = value,
                    p if p.contains("bytes smem") => kernel.shared = value,
                    _ => {}
                }
            }
        }
    }
    kernels
}

/// The first number of `part`.
fn before(part: &str) -> u32 {
    let mut words = part.split_whitespace();
    words.find_map(|word| word.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{KernelResources, architectures, parse_resources};

    #[test]
    fn each_device_gets_a_cubin_that_runs_there_or_portable_ptx() {
        for (capability, expected) in [
            ((8, 0), "sm_80"),
            ((8, 6), "sm_86"),
            ((8, 7), "sm_86"),
            ((8, 9), "sm_89"),
            ((9, 0), "sm_90a"),
            ((10, 0), "sm_100a"),
            ((10, 3), "compute_100"),
            ((11, 0), "compute_100"),
            ((12, 0), "sm_120a"),
            ((12, 1), "compute_120"),
            ((13, 0), "compute_120"),
        ] {
            assert_eq!(architectures(capability)[0], expected, "{capability:?}");
        }
        assert_eq!(
            architectures((8, 7)),
            ["sm_86", "sm_80", "compute_86", "compute_80"]
        );
    }

    #[test]
    fn resources_are_read_from_the_log() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'first' for 'sm_90a'\n\
            ptxas info    : Function properties for first\n    \
                16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 1056 bytes smem\n\
            ptxas info    : Compile time = 3.1 ms\n\
            ptxas info    : Compiling entry function 'second' for 'sm_90a'\n\
            ptxas info    : Function properties for second\n    \
                0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 0 barriers\n";
        let first = KernelResources {
            kernel: "first".into(),
            registers: 40,
            spill_stores: 8,
            spill_loads: 12,
            stack: 16,
            shared: 1056,
        };
        let second = KernelResources {
            kernel: "second".into(),
            registers: 255,
            spill_stores: 0,
            spill_loads: 0,
            stack: 0,
            shared: 0,
        };
        assert_eq!(parse_resources(log), [first, second]);
    }
}
