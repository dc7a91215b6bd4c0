//! Tests of the device through the driver's interface: on the stand-in, or on a GPU.

mod device;
mod gemm;
mod graph;
mod kernels;

use super::{CudaDevice, Memory, Module};
use crate::test_support::{cuda_device, new_cuda_device, normal};
use std::ffi::{CString, c_char, c_int};
use std::process::Command;
use std::sync::Arc;

static MODULE: Module = Module {
    name: "test",
    source: include_str!("kernel.cu"),
};

/// Device memory that holds `values`.
fn uploaded<T: bytemuck::NoUninit>(device: &Arc<CudaDevice>, values: &[T]) -> Memory {
    let memory = device.alloc(size_of_val(values));
    let bytes = bytemuck::cast_slice(values);
    device.upload(memory.ptr(), bytes).expect("uploads");
    memory
}

/// The first `len` values of `memory`.
fn downloaded<T: bytemuck::Pod>(memory: &Memory, len: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); len];
    let bytes = bytemuck::cast_slice_mut(&mut values);
    let device = memory.device();
    device.download(bytes, memory.ptr()).expect("downloads");
    values
}

/// Runs `body`, the rest of the test `name`, in a process of its own: a fault takes the context of
/// all tests with it.
#[track_caller]
fn in_own_process(name: &str, body: impl FnOnce()) {
    const CHILD: &str = "FERROTUNE_TEST_CHILD";
    if std::env::var_os(CHILD).is_some_and(|child| child == name) {
        return body();
    }
    let test = std::env::current_exe().expect("the test has a path");
    let output = Command::new(test)
        .args(["--exact", "--nocapture", &format!("cuda::tests::{name}")])
        .env(CHILD, name)
        .output()
        .expect("the test starts once more");
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(
        output.status.success() && out.contains("1 passed"),
        "{out}{err}"
    );
}

/// Makes the driver fail on this thread: `OPERATION:AFTER:CODE`. False on a GPU, which has no such
/// switch.
fn inject(what: &str) -> bool {
    if std::env::var_os("FERROTUNE_TEST_DEVICE").is_some_and(|device| device == "cuda") {
        return false;
    }
    let what = CString::new(what).expect("no zero byte");
    let library = crate::host_cuda::libraries().join("libcuda.so.1");
    // SAFETY: the library is open already, and the function has this type.
    unsafe {
        let library = libloading::Library::new(library).expect("the stand-in opens");
        let inject = library
            .get::<unsafe extern "C" fn(*const c_char) -> c_int>(b"ferrotune_host_inject")
            .expect("the stand-in can fail");
        assert_eq!(inject(what.as_ptr()), 0, "{what:?}");
    }
    true
}
