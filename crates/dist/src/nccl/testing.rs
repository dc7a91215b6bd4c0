//! For tests: a library of our own that sums between threads or processes, and misbehaves on demand, and ranks on
//! stand-in GPUs. See `crates/kernels/host/nccl.cpp`.

use super::{Nccl, NcclOptions};
use crate::Local;
use ferrotune_core::Result;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use ferrotune_kernels::cuda::set_library_directory;
use ferrotune_kernels::{Device, host_cuda};
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// A copy of the library in a folder of its own, so that tests do not share its state.
pub(super) struct FakeLibrary(TempDir);

impl FakeLibrary {
    /// One that misbehaves as `wishes` say, a line each.
    pub(super) fn new(wishes: &str) -> Self {
        Self::copy("libnccl.so.2", wishes)
    }

    /// One that lacks a function.
    pub(super) fn without_finalize() -> Self {
        Self::copy("libnccl-incomplete.so.2", "")
    }

    fn copy(name: &str, wishes: &str) -> Self {
        // It asks for the driver by name, which the loader knows from now on.
        gpu();
        let folder = tempfile::tempdir().expect("a folder");
        let library = folder.path().join("libnccl.so.2");
        fs::copy(host_cuda::libraries().join(name), library).expect("a copy");
        fs::write(folder.path().join("misbehave"), wishes).expect("a file");
        Self(folder)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.0.path().join("libnccl.so.2")
    }

    /// Calls of one rank so far: name, and what follows it. Needs the wish `log`.
    pub(super) fn calls(&self, rank: usize) -> Vec<(String, Vec<u64>)> {
        let path = self.0.path().join(format!("calls.{rank}"));
        let text = fs::read_to_string(path).expect("`log` was wished for");
        let call = |line: &str| {
            let mut words = line.split(' ');
            let name = words.next().unwrap_or_default().to_owned();
            let numbers = words.map(|word| word.parse().expect("a number")).collect();
            (name, numbers)
        };
        text.lines().map(call).collect()
    }
}

/// A stand-in GPU of its own, with its own streams.
pub(super) fn gpu() -> Device {
    set_library_directory(host_cuda::libraries()).expect("tests set the libraries only to these");
    Device::cuda(0).expect("the stand-in opens")
}

/// A rank's part of a test, on its own thread.
pub(super) fn on_each_rank<R: Send>(
    world: usize,
    body: impl Fn(Local, Device) -> R + Sync,
) -> Vec<R> {
    let body = &body;
    thread::scope(|scope| {
        let ranks = Local::group(world, Duration::from_secs(60));
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| scope.spawn(move || body(rank, gpu())))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("rank panicked"))
            .collect()
    })
}

/// A group over `host` that uses `library`, with buckets of `bucket` elements.
pub(super) fn join(
    host: Local,
    device: &Device,
    library: &FakeLibrary,
    timeout: Duration,
    bucket: usize,
) -> Result<Nccl> {
    let options = NcclOptions {
        library: Some(library.path()),
        timeout,
        bucket_bytes: bucket * 4,
        peers: None,
    };
    Nccl::new(Box::new(host), device, options)
}

/// One tensor of `values`, at home on `device`.
pub(super) fn buffer(device: &Device, values: &[f32]) -> FlatBuffer {
    let mut layout = ParamLayoutBuilder::new();
    let id = layout.add(ParamSpec::new("w", [values.len()], 0));
    let mut buffer = FlatBuffer::zeros_on(&layout.build().expect("one tensor"), device);
    buffer.get_mut(id).copy_from_slice(values);
    buffer
}

/// Values of a rank whose sums round, so that the order of additions shows in their bits.
pub(super) fn values(rank: usize, len: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 7919 + rank * 104_729) % 1_000_003) as f32 * 1.7e-4 - 31.0;
    (0..len).map(value).collect()
}
