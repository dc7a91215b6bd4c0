//! Kernels ahead of a run: what is compiled already, and compiling without a device.

use super::cache::{FOLDER_VARIABLE, file_name, folder, key, read, write};
use super::compiler::{self, Compiled, Module};
use crate::Result;
use std::env;
use std::path::{Path, PathBuf};

/// Where [`find`] found a compiled module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In the folder of compiled kernels that `FERROTUNE_KERNELS` names.
    Folder(PathBuf),
    /// In the cache on disk.
    Cache(PathBuf),
}

/// The whole file of `module` compiled for `arch` where runs look for it: in the folder that
/// `FERROTUNE_KERNELS` names, or without one in the cache.
///
/// # Errors
/// Without that folder, if there is no compiler: entries of the cache carry its version.
pub fn find(module: &Module, arch: &str) -> Result<Option<Origin>> {
    if let Some(folder) = env::var_os(FOLDER_VARIABLE).filter(|value| !value.is_empty()) {
        let path = PathBuf::from(folder).join(file_name(module, arch));
        return Ok(read(&path).map(|_| Origin::Folder(path)));
    }
    let whole = entry(module, arch)?.filter(|path| read(path).is_some());
    Ok(whole.map(Origin::Cache))
}

/// Compiles `module` for `arch`, like `sm_90a`, or `compute_90` for PTX, unless the cache has both the
/// result and what the compiler said about it; leaves them there.
///
/// # Errors
/// Those of [`compile`](compiler::compile).
pub fn compile_cached(module: &Module, arch: &str) -> Result<Compiled> {
    let entry = entry(module, arch)?;
    if let Some(compiled) = entry.as_deref().and_then(compiled_at) {
        return Ok(compiled);
    }
    let compiled = compiler::compile(module, arch)?;
    if let Some(entry) = &entry {
        // A read-only or full home costs a compilation, not the command.
        let _ = write(entry, &compiled.cubin);
        let _ = write(&log_of(entry), compiled.log.as_bytes());
    }
    Ok(compiled)
}

/// An entry of the cache that has its log.
fn compiled_at(entry: &Path) -> Option<Compiled> {
    let (cubin, log) = (read(entry)?, read(&log_of(entry))?);
    Some(Compiled::new(cubin, String::from_utf8(log).ok()?))
}

/// Path of `module` in the cache, if there is a cache.
fn entry(module: &Module, arch: &str) -> Result<Option<PathBuf>> {
    let place = folder().map(|folder| Ok(folder.join(key(module, arch)?)));
    place.transpose()
}

/// What the compiler said, beside its result.
fn log_of(entry: &Path) -> PathBuf {
    entry.with_extension("log")
}
