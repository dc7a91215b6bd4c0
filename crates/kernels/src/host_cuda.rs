//! For tests: CUDA on a machine without a GPU. Builds the stand-ins of `host/` with the host's C++
//! compiler and opens a device on them.

use crate::cuda::{CudaDevice, set_kernel_cache, set_library_directory};
use std::env;
use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

/// Environment variable that asks for a real GPU when it is `cuda`.
const DEVICE_VARIABLE: &str = "FERROTUNE_TEST_DEVICE";
/// Environment variable with the mode of `host/build.sh`: `plain`, or `asan` with sanitizers.
const MODE_VARIABLE: &str = "FERROTUNE_HOST_MODE";

/// The folder of the stand-ins, built on first use beside the running program. What
/// `FERROTUNE_CUDA_LIBRARIES` is set to for a program that a test starts.
///
/// # Panics
/// Without a C++ compiler.
#[must_use]
pub fn libraries() -> PathBuf {
    let mode = env::var(MODE_VARIABLE).unwrap_or_else(|_| "plain".into());
    let folder = folder().join("host-cuda").join(&mode);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("host/build.sh");
    // The script does nothing if all is there, and holds a lock while it builds.
    let built = Command::new("bash")
        .arg(&script)
        .arg(&folder)
        .arg(&mode)
        .output();
    let built = built.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    assert!(
        built.status.success(),
        "tests of CUDA need a C++ compiler, or a GPU and {DEVICE_VARIABLE}=cuda:\n{}",
        String::from_utf8_lossy(&built.stderr)
    );
    folder
}

/// Where the running program lies, outside of cargo's `deps`.
fn folder() -> PathBuf {
    let exe = env::current_exe().expect("the running program has a path");
    let folder = exe.parent().expect("a program lies in a folder");
    match folder.file_name() {
        Some(name) if name == "deps" => folder.parent().unwrap_or(folder).to_owned(),
        _ => folder.to_owned(),
    }
}

/// The device of the tests: the stand-in, or GPU 0 when `FERROTUNE_TEST_DEVICE=cuda`.
///
/// # Panics
/// If it cannot be opened.
#[must_use]
pub fn device() -> Arc<CudaDevice> {
    static DEVICE: OnceLock<Arc<CudaDevice>> = OnceLock::new();
    let open = || {
        if env::var(DEVICE_VARIABLE).as_deref() != Ok("cuda") {
            set_library_directory(libraries()).expect("tests set the libraries only here");
        }
        // Not the user's: what tests compile is of no use to anybody else.
        set_kernel_cache(folder().join("test-kernels")).expect("tests set the cache only here");
        CudaDevice::open(0).expect("the device of the tests opens")
    };
    Arc::clone(DEVICE.get_or_init(open))
}

/// Makes the stand-in fail on this thread: `OPERATION:AFTER:CODE`, as `host/README.md` says. False on a
/// GPU, which has no such switch.
///
/// # Panics
/// If `what` has another form.
#[must_use]
pub fn inject(what: &str) -> bool {
    if env::var(DEVICE_VARIABLE).as_deref() == Ok("cuda") {
        return false;
    }
    let text = CString::new(what).expect("no zero byte");
    let library = libraries().join("libcuda.so.1");
    // SAFETY: the library is open already, and the function has this type.
    let status = unsafe {
        let library = libloading::Library::new(library).expect("the stand-in opens");
        let inject = library
            .get::<unsafe extern "C" fn(*const c_char) -> c_int>(b"ferrotune_host_inject")
            .expect("the stand-in can fail");
        inject(text.as_ptr())
    };
    assert_eq!(status, 0, "{what:?}");
    true
}

#[cfg(test)]
mod tests {
    use crate::Element;
    use crate::cuda::{CudaDevice, Grid, Memory, Module};
    use crate::test_support::cuda_device;
    use half::bf16;
    use std::sync::Arc;

    static KERNELS: Module = Module {
        name: "selftest",
        source: include_str!("../host/selftest/kernels.cu"),
    };

    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Values {
        input: u64,
        output: u64,
        count: u32,
        unused: u32,
    }

    fn upload(device: &Arc<CudaDevice>, values: &[f32]) -> Memory {
        let memory = device.alloc(size_of_val(values));
        device
            .upload(memory.ptr(), bytemuck::cast_slice(values))
            .expect("the memory holds the values");
        memory
    }

    fn download(memory: &Memory) -> Vec<f32> {
        let mut values = vec![0.0_f32; memory.bytes() / 4];
        memory
            .device()
            .download(bytemuck::cast_slice_mut(&mut values), memory.ptr())
            .expect("the values come back");
        values
    }

    #[test]
    fn kernels_round_to_bf16_as_the_host_does() {
        // Around every bf16: itself, and below, at and above the middle to the next.
        let values: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| (high, low)))
            .map(|(high, low): (u16, u16)| f32::from_bits(u32::from(high) << 16 | u32::from(low)))
            .collect();
        let device = cuda_device();
        let (input, output) = (upload(&device, &values), device.alloc(values.len() * 4));
        let params = Values {
            input: input.ptr(),
            output: output.ptr(),
            count: values.len() as u32,
            unused: 0,
        };
        device
            .launch(&KERNELS, "through_bf16_1", Grid::new(16, 256), &params)
            .expect("the kernel runs");
        for (&value, got) in values.iter().zip(download(&output)) {
            let want = <bf16 as Element>::from_f32(value).to_f32();
            let same = got.to_bits() == want.to_bits();
            assert!(same || got.is_nan() && want.is_nan(), "{value}: {got}");
        }
    }

    #[test]
    fn copies_and_fills_reach_what_they_name() {
        let device = cuda_device();
        let (a, b) = (upload(&device, &[1.0, 2.0, 3.0]), device.alloc(12));
        device.copy(b.ptr(), a.ptr(), 12).expect("both hold 12");
        device.fill_zero(b.ptr() + 4, 4).expect("b holds 12");
        assert_eq!(download(&b), [1.0, 0.0, 3.0]);
    }
}
