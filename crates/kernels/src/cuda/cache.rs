//! Where a cubin comes from: a folder of compiled kernels, the cache on disk, or the compiler.

use super::compiler::{self, Compiled, FLAGS, HEADERS};
use super::{CudaDevice, Handle, Module, library};
use crate::{Error, Result};
use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Environment variable that names a folder of compiled kernels.
pub(super) const FOLDER_VARIABLE: &str = "FERROTUNE_KERNELS";
/// Environment variable that names the cache folder; empty means no cache.
const CACHE_VARIABLE: &str = "FERROTUNE_KERNEL_CACHE";
/// Bytes of the digest at the end of a file, where whatever reads cubins does not look.
const DIGEST: usize = 32;

static CACHE: OnceLock<PathBuf> = OnceLock::new();

/// Sets the folder where compiled kernels are kept between runs, before the environment's
/// `FERROTUNE_KERNEL_CACHE` and the user's cache folder. Call it before the first kernel is launched.
///
/// # Errors
/// If another folder was set before.
pub fn set_kernel_cache(path: impl Into<PathBuf>) -> Result<()> {
    library::set_once(&CACHE, &path.into(), "cuda::set_kernel_cache")
}

/// Loads `module` onto `device`.
pub(super) fn load(device: &CudaDevice, module: &Module) -> Result<Handle> {
    if let Some(folder) = env::var_os(FOLDER_VARIABLE).filter(|value| !value.is_empty()) {
        return load_from_folder(device, module, Path::new(&folder));
    }
    load_through_cache(device, module, folder().as_deref())
}

/// Loads `module` from a folder of compiled kernels.
pub(super) fn load_from_folder(
    device: &CudaDevice,
    module: &Module,
    folder: &Path,
) -> Result<Handle> {
    let candidates = compiler::architectures(device.compute_capability());
    let files = candidates.iter().map(|arch| file_name(module, arch));
    for file in files.clone() {
        if let Some(image) = read(&folder.join(file)) {
            return device.load_image(module, &image);
        }
    }
    Err(Error::Library {
        library: format!("kernels of {}", module.name),
        problem: format!(
            "{FOLDER_VARIABLE} names {}, which has none of {}, or damaged ones",
            folder.display(),
            files.collect::<Vec<_>>().join(", ")
        ),
        fix: format!(
            "make them with `ferrotune kernels --arch {} --out {}`, or unset {FOLDER_VARIABLE}",
            candidates.first().map_or("sm_80", String::as_str),
            folder.display()
        ),
    })
}

/// Loads `module` from the cache in `folder`, or compiles it and leaves it there.
pub(super) fn load_through_cache(
    device: &CudaDevice,
    module: &Module,
    folder: Option<&Path>,
) -> Result<Handle> {
    let arch = compiler::architecture(device.compute_capability())?;
    let name = key(module, &arch)?;
    let entry = folder.map(|folder| folder.join(name));
    if let Some(image) = entry.as_deref().and_then(read) {
        // An entry that does not load is made anew, like one that cannot be read.
        if let Ok(handle) = device.load_image(module, &image) {
            return Ok(handle);
        }
    }
    let compiled = compiler::compile(module, &arch)?;
    if let Some(entry) = &entry {
        // A read-only or full home costs a compilation per start, not the run.
        let _ = write(entry, &compiled.cubin);
    }
    device.load_image(module, &compiled.cubin)
}

/// Name of the file of `module` in a folder of compiled kernels. It holds a digest of the source, so
/// that kernels of another version are not found.
#[must_use]
pub fn file_name(module: &Module, arch: &str) -> String {
    let digest = source_digest(module, arch).finalize().to_hex();
    let kind = if arch.starts_with("compute_") {
        "ptx"
    } else {
        "cubin"
    };
    format!("{}-{arch}-{}.{kind}", module.name, &digest[..16])
}

/// Writes `compiled` into a folder of compiled kernels and returns the path.
///
/// # Errors
/// If the file cannot be written.
pub fn save(
    folder: &Path,
    module: &Module,
    arch: &str,
    compiled: &Compiled,
) -> std::io::Result<PathBuf> {
    let path = folder.join(file_name(module, arch));
    write(&path, &compiled.cubin)?;
    Ok(path)
}

/// Everything a cubin depends on, but the compiler.
fn source_digest(module: &Module, arch: &str) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(module.name);
    add(module.source);
    for (name, text) in HEADERS {
        add(name);
        add(text);
    }
    add(arch);
    for flag in FLAGS {
        add(flag);
    }
    hasher
}

/// File of `module` in the cache.
pub(super) fn key(module: &Module, arch: &str) -> Result<String> {
    let (major, minor) = compiler::version()?;
    let mut hasher = source_digest(module, arch);
    hasher.update(&major.to_le_bytes());
    hasher.update(&minor.to_le_bytes());
    Ok(format!("{}.cubin", hasher.finalize().to_hex()))
}

/// The cache folder, if there is a home for one.
pub(super) fn folder() -> Option<PathBuf> {
    if let Some(folder) = CACHE.get() {
        return Some(folder.clone());
    }
    if let Some(folder) = env::var_os(CACHE_VARIABLE) {
        return (!folder.is_empty()).then(|| folder.into());
    }
    let absolute = |name: &str| {
        let path = PathBuf::from(env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("ferrotune").join("kernels"))
}

/// The contents of a file, if it is whole: they end with their digest.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let digest = bytes.split_off(bytes.len().checked_sub(DIGEST)?);
    (blake3::hash(&bytes).as_bytes()[..] == digest).then_some(bytes)
}

/// Writes a file beside its place and renames it there, so that ranks that race see a whole one.
pub(super) fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(image)?;
    file.write_all(blake3::hash(image).as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Module, file_name, read, write};

    #[test]
    fn a_file_is_read_only_if_it_is_whole() {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let path = folder.path().join("new/entry");
        assert_eq!(read(&path), None, "missing");
        write(&path, b"kernels").expect("the folder is made");
        assert_eq!(read(&path).as_deref(), Some(&b"kernels"[..]));
        let mut bytes = std::fs::read(&path).expect("just written");
        bytes[2] ^= 1;
        std::fs::write(&path, &bytes).expect("writable");
        assert_eq!(read(&path), None, "changed");
        std::fs::write(&path, &bytes[..20]).expect("writable");
        assert_eq!(read(&path), None, "cut off");
    }

    #[test]
    fn names_depend_on_source_and_architecture() {
        let module = |source| Module { name: "op", source };
        let name = file_name(&module("a"), "sm_80");
        assert!(
            name.starts_with("op-sm_80-") && name.ends_with(".cubin"),
            "{name}"
        );
        assert_ne!(name, file_name(&module("b"), "sm_80"));
        assert_ne!(name[9..], file_name(&module("a"), "sm_86")[9..]);
        assert!(file_name(&module("a"), "compute_90").ends_with(".ptx"));
    }
}
