//! Compiling, caching, launching.

use super::{
    MODULE, cuda_device, downloaded, in_own_process, inject, new_cuda_device, normal, uploaded,
};
use crate::cuda::{Grid, Module, cache, compile, compiler, save};
use crate::{Error, ErrorKind};
use std::path::Path;
use std::process::{Command, Stdio};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Add {
    a: u64,
    out: u64,
    a_pitch: u64,
    out_pitch: u64,
    rows: u32,
    cols: u32,
    scale: f32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Sum {
    a: u64,
    out: u64,
    cols: u32,
    offset: u32,
}

/// Adds `a` twice to a matrix of ones.
fn add(device: &std::sync::Arc<crate::cuda::CudaDevice>) {
    let a = normal(1, 3 * 70);
    let (a_memory, out) = (uploaded(device, &a), uploaded(device, &[1.0_f32; 3 * 75]));
    let params = Add {
        a: a_memory.ptr(),
        out: out.ptr(),
        a_pitch: 70,
        out_pitch: 75,
        rows: 3,
        cols: 70,
        scale: 2.0,
        unused: 0,
    };
    device
        .launch(&MODULE, "add_f32", Grid::new(3, 64), &params)
        .expect("launches");
    let got = downloaded::<f32>(&out, 3 * 75);
    for r in 0..3 {
        for c in 0..75 {
            let expected = if c < 70 {
                1.0 + 2.0 * a[r * 70 + c]
            } else {
                1.0
            };
            assert_eq!(got[r * 75 + c].to_bits(), expected.to_bits(), "{r} {c}");
        }
    }
}

#[test]
fn a_kernel_runs() {
    add(&cuda_device());
}

#[test]
fn no_blocks_launch_nothing() {
    let device = cuda_device();
    let params = Sum {
        a: 0,
        out: 0,
        cols: 4,
        offset: 0,
    };
    device
        .launch(&MODULE, "sum_f32", Grid::new([2, 0], 64), &params)
        .expect("a no-op");
    device.synchronize().expect("nothing ran");
}

#[test]
fn dynamic_shared_memory_grows_on_demand() {
    let device = cuda_device();
    let a = normal(2, 2 * 90);
    let memory = uploaded(&device, &a);
    // Below the 48 KiB that need no asking, above, more, and less again.
    for offset in [0_u32, 14_000, 20_000, 100] {
        let out = device.alloc(8);
        let params = Sum {
            a: memory.ptr(),
            out: out.ptr(),
            cols: 90,
            offset,
        };
        let grid = Grid::new(2, 64).with_shared((offset + 90) * 4);
        device
            .launch(&MODULE, "sum_f32", grid, &params)
            .expect("launches");
        for (r, got) in downloaded::<f32>(&out, 2).into_iter().enumerate() {
            let expected: f64 = a[r * 90..][..90].iter().map(|&v| f64::from(v)).sum();
            assert!((f64::from(got) - expected).abs() < 1e-4, "{got} {expected}");
        }
    }
}

#[test]
fn a_wrong_kernel_or_struct_is_refused() {
    let params = Sum {
        a: 0,
        out: 0,
        cols: 0,
        offset: 0,
    };
    let device = new_cuda_device();
    let error = device.launch(&MODULE, "absent", Grid::new(1, 64), &params);
    let text = error.expect_err("there is no such kernel").to_string();
    assert!(
        text.contains("the module test has no kernel \"absent\""),
        "{text}"
    );

    let device = new_cuda_device();
    let error = device.launch(&MODULE, "add_f32", Grid::new(1, 64), &params);
    let text = error.expect_err("a wrong size").to_string();
    assert!(
        text.contains("add_f32 takes a struct of 48 bytes, got 24"),
        "{text}"
    );
    assert_eq!(device.check().expect_err("it sticks").to_string(), text);
}

#[test]
fn a_launch_that_faults_shows_later() {
    in_own_process("kernels::a_launch_that_faults_shows_later", || {
        let device = new_cuda_device();
        let memory = uploaded(&device, &[0.0_f32; 4]);
        device.prepare(&MODULE).expect("compiles");
        if !inject("launch:0:700") {
            return;
        }
        let params = Sum {
            a: memory.ptr(),
            out: memory.ptr(),
            cols: 0,
            offset: 0,
        };
        let _ = device.launch(&MODULE, "sum_f32", Grid::new(1, 64), &params);
        let error = device.synchronize().expect_err("an illegal address");
        assert_eq!(error.kind(), ErrorKind::DeviceFault, "{error}");
    });
}

#[test]
fn what_does_not_compile_shows_the_log() {
    static BROKEN: Module = Module {
        name: "broken",
        source: "#include \"types.cuh\"\nDEVICE void f() { not_declared(); }\n",
    };
    let device = new_cuda_device();
    let error = device.prepare(&BROKEN).expect_err("it does not compile");
    let Error::Compile { module, log, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*module, "broken");
    assert!(log.contains("not_declared"), "{log}");
    assert!(error.to_string().contains(log), "{error}");
}

#[test]
fn every_architecture_compiles_without_a_device() {
    let _set = cuda_device();
    for (arch, _) in compiler::ARCHITECTURES {
        let compiled = compile(&MODULE, arch).expect("compiles");
        assert!(!compiled.cubin.is_empty(), "{arch}");
    }
}

fn only_entry(folder: &Path) -> std::path::PathBuf {
    let mut entries = std::fs::read_dir(folder).expect("the folder is there");
    let entry = entries.next().expect("an entry").expect("readable").path();
    assert!(entries.next().is_none(), "one entry, no leftovers");
    entry
}

#[test]
fn a_damaged_cache_entry_is_made_anew() {
    let device = new_cuda_device();
    let folder = tempfile::tempdir().expect("a folder for the test");
    let load = || cache::load_through_cache(&device, &MODULE, Some(folder.path()));
    load().expect("compiles");
    let entry = only_entry(folder.path());
    let whole = std::fs::read(&entry).expect("readable");
    for damaged in [&whole[..whole.len() / 2], &[], b"nothing of the kind"] {
        std::fs::write(&entry, damaged).expect("writable");
        load().expect("compiles again");
        assert!(
            std::fs::read(only_entry(folder.path()))
                .expect("readable")
                .len()
                > 1000
        );
    }
    // Whole, but not for this driver: the digest holds, loading fails.
    let foreign = b"\x7fELF of another machine".to_vec();
    let digest = *blake3::hash(&foreign).as_bytes();
    std::fs::write(&entry, [&foreign[..], &digest].concat()).expect("writable");
    load().expect("compiles again");
    device.check().expect("nothing sticks");
}

#[test]
fn a_hit_needs_no_compilation() {
    let device = new_cuda_device();
    let folder = tempfile::tempdir().expect("a folder for the test");
    cache::load_through_cache(&device, &MODULE, Some(folder.path())).expect("compiles");
    let entry = only_entry(folder.path());
    let made = || {
        std::fs::metadata(&entry)
            .and_then(|m| m.modified())
            .expect("it is there")
    };
    let before = made();
    cache::load_through_cache(&device, &MODULE, Some(folder.path())).expect("loads");
    assert_eq!(made(), before);
}

#[test]
fn a_cache_that_cannot_be_written_costs_a_compilation() {
    let device = new_cuda_device();
    let file = tempfile::NamedTempFile::new().expect("a file for the test");
    // A file where the folder should be: nobody can write there, root included.
    cache::load_through_cache(&device, &MODULE, Some(&file.path().join("kernels")))
        .expect("compiles");
    cache::load_through_cache(&device, &MODULE, None).expect("compiles");
}

#[test]
fn compiled_kernels_are_found_in_their_folder() {
    let device = new_cuda_device();
    let folder = tempfile::tempdir().expect("a folder for the test");
    let error = cache::load_from_folder(&device, &MODULE, folder.path()).map(|_| ());
    let text = error.expect_err("the folder is empty").to_string();
    assert!(
        text.contains("test-sm_") && text.contains("ferrotune kernels --arch"),
        "{text}"
    );

    // An older architecture of the same family runs too.
    let candidates = compiler::architectures(device.compute_capability());
    let arch = candidates
        .iter()
        .rfind(|arch| arch.starts_with("sm_"))
        .expect("a cubin");
    let compiled = compile(&MODULE, arch).expect("compiles");
    save(folder.path(), &MODULE, arch, &compiled).expect("writable");
    cache::load_from_folder(&device, &MODULE, folder.path()).expect("loads");
}

/// Runs only as a child of the test below.
#[test]
fn child_that_races_for_the_cache() {
    let Some(folder) = std::env::var_os("FERROTUNE_TEST_RACE") else {
        return;
    };
    let device = new_cuda_device();
    cache::load_through_cache(&device, &MODULE, Some(Path::new(&folder))).expect("loads");
}

#[test]
fn processes_and_threads_that_race_for_the_cache_all_win() {
    let device = cuda_device();
    let folder = tempfile::tempdir().expect("a folder for the test");
    let test = std::env::current_exe().expect("the test has a path");
    let children: Vec<_> = (0..3)
        .map(|_| {
            Command::new(&test)
                .args([
                    "--exact",
                    "cuda::tests::kernels::child_that_races_for_the_cache",
                ])
                .env("FERROTUNE_TEST_RACE", folder.path())
                .stdout(Stdio::null())
                .spawn()
                .expect("the test starts once more")
        })
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                device.synchronize().expect("a sound device");
                cache::load_through_cache(&device, &MODULE, Some(folder.path())).expect("loads");
            });
        }
    });
    for mut child in children {
        assert!(child.wait().expect("it ends").success());
    }
    only_entry(folder.path());
}
