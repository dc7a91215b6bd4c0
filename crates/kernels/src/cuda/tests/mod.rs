//! Tests of the device through the driver's interface: on the stand-in, or on a GPU.

mod bandwidth;
mod device;
mod gemm;
mod graph;
mod kernels;
mod profile;
mod speed;

use super::{CudaDevice, Memory, Module};
use crate::host_cuda::inject;
use crate::test_support::{cuda_device, new_cuda_device, normal};
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
