//! `ferrotune kernels` on a machine without a GPU. What needs the compiler is in ci/kernels.sh.

mod common;

use common::{command, ferrotune, text};
use serde_json::Value;
use std::path::PathBuf;

/// A small library that this process has open, wherever it lies here.
fn some_library() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux");
    let mut paths = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    let found = paths.find(|path| path.contains("libgcc_s"));
    found.expect("Rust unwinds with libgcc_s").into()
}

#[test]
fn arguments_that_make_no_sense_are_usage_errors() {
    let unknown = ferrotune(&["kernels", "--arch", "sm_80,sm_90"]).expect(2);
    assert!(
        unknown.stderr.contains("did you mean `sm_90a`?"),
        "{}",
        unknown.stderr
    );
    ferrotune(&["kernels", "--list", "--out", "x"]).expect(2);
    ferrotune(&["kernels", "--write", "x", "--check", "x"]).expect(2);
    let ptx = ferrotune(&["kernels", "--arch", "compute_90", "--write", "x"]).expect(2);
    assert!(ptx.stderr.contains("compute_90 is PTX"), "{}", ptx.stderr);
}

#[test]
fn a_table_that_is_not_there_is_named() {
    let missing = ferrotune(&["kernels", "--check", "no-such-table.json"]).expect(65);
    assert!(
        missing.stderr.contains("no-such-table.json"),
        "{}",
        missing.stderr
    );
}

#[test]
fn the_list_needs_neither_gpu_nor_compiler() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let listed = command(&["kernels", "--list", "--json", "--arch", "sm_80"])
        .env("FERROTUNE_KERNELS", folder.path())
        .output()
        .expect("the program starts");
    assert_eq!(listed.status.code(), Some(0));
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let modules = listed["modules"].as_array().expect("a list");
    let gated = modules
        .iter()
        .find(|module| module["module"] == "activation");
    let gated = gated.expect("gated activations have kernels");
    let kernels = gated["kernels"].as_array().expect("a list");
    assert!(
        kernels.contains(&"gated_silu_forward_bf16".into()),
        "{kernels:?}"
    );
    assert_eq!(gated["cubins"]["sm_80"]["from"], "none");
}

#[test]
fn a_library_that_is_no_compiler_is_refused_with_its_path_and_what_to_do() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let library = folder.path().join("libnvrtc.so.13");
    std::fs::copy(some_library(), &library).expect("a copy");
    let refused = command(&["kernels", "--out", text(&folder.path().join("out"))])
        .env("FERROTUNE_CUDA_LIBRARIES", folder.path())
        .output()
        .expect("the program starts");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{said}");
    assert!(said.contains(text(&library)), "{said}");
    assert!(said.contains("install a newer one"), "{said}");
}
