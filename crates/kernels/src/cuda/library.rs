//! Finding and opening libcuda, libnvrtc and libcublasLt at run time.
//!
//! Nothing is linked, so the program starts on a machine without a GPU. A directory given with
//! [`set_library_directory`] or in `FERROTUNE_CUDA_LIBRARIES` is tried first, then the names the
//! system loader knows, then the places where pip, conda and the CUDA toolkit put libraries.

use super::bindings::{CublasLt, Driver, Nvrtc};
use super::error;
use crate::{Error, Result};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::env;
use std::ffi::{CStr, c_int};
use std::fs;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Environment variable that names the directory tried first.
const DIRECTORY_VARIABLE: &str = "FERROTUNE_CUDA_LIBRARIES";
/// Oldest driver API: CUDA 12.0.
const OLDEST_DRIVER: i32 = 12_000;

static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();

/// Sets the directory where the CUDA libraries are looked for first, before the environment's
/// `FERROTUNE_CUDA_LIBRARIES`. Call it before the first device is opened.
///
/// # Errors
/// If another directory was set before.
pub fn set_library_directory(path: impl Into<PathBuf>) -> Result<()> {
    set_once(&DIRECTORY, &path.into(), "cuda::set_library_directory")
}

/// Sets a path; the same one may be set again.
pub(super) fn set_once(place: &OnceLock<PathBuf>, path: &Path, op: &'static str) -> Result<()> {
    let set = place.get_or_init(|| path.to_owned());
    if set == path {
        return Ok(());
    }
    Err(Error::Invalid {
        op,
        message: format!("{} is set already", set.display()),
    })
}

/// A library that stays open for the life of the process.
#[derive(Debug)]
pub struct Opened {
    library: ManuallyDrop<Library>,
    path: PathBuf,
    oldest: &'static str,
}

impl Opened {
    /// Where it was found: a path, or a name that the system loader knew.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The function `name`.
    ///
    /// # Errors
    /// If the library has no such function.
    ///
    /// # Safety
    /// `T` must be the type of that function.
    pub unsafe fn symbol<T: Copy>(&self, name: &'static str) -> Result<T> {
        // SAFETY: the caller vouches for the type.
        unsafe { self.optional_symbol(name) }.ok_or_else(|| Error::Library {
            library: self.path.display().to_string(),
            problem: format!("has no function {name}"),
            fix: format!(
                "it is older than {} or not this library at all; install a newer one",
                self.oldest
            ),
        })
    }

    /// The function `name`, if the library has it.
    ///
    /// # Safety
    /// `T` must be the type of that function.
    pub(super) unsafe fn optional_symbol<T: Copy>(&self, name: &'static str) -> Option<T> {
        // SAFETY: the caller vouches for the type.
        let symbol: Symbol<T> = unsafe { self.library.get(name.as_bytes()) }.ok()?;
        Some(*symbol)
    }
}

/// A library that is looked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// What errors call it.
    pub name: &'static str,
    /// The file, or a folder that holds it; if set, it is looked for nowhere else.
    pub given: Option<PathBuf>,
    /// Sonames, best first.
    pub sonames: Vec<String>,
    /// Folders of a pip root (`.../site-packages`) that can hold it.
    pub wheels: &'static [&'static str],
    /// Files of its own folder that it opens by bare name start like this; empty for none.
    pub companions: &'static str,
    /// The oldest release that has every function.
    pub oldest: &'static str,
    /// What helps where there is none.
    pub fix: &'static str,
}

/// The toolkit's oldest release.
const OLDEST_TOOLKIT: &str = "CUDA 12";
/// What cuInit says where no GPU is visible.
const NO_DEVICE: u32 = cudarc::driver::sys::cudaError_enum::CUDA_ERROR_NO_DEVICE as u32;

/// The driver, probed: present, new enough, and initialised.
pub(super) fn driver() -> Result<&'static Driver> {
    static TABLE: OnceLock<Driver> = OnceLock::new();
    static OPENING: Mutex<()> = Mutex::new(());
    once(&TABLE, &OPENING, || {
        let opened = open(&Wanted {
            name: "libcuda",
            given: None,
            sonames: vec!["libcuda.so.1".into()],
            wheels: &[],
            companions: "",
            oldest: OLDEST_TOOLKIT,
            fix: "it comes with the NVIDIA driver: install one (525 or newer), or start the \
                  container with GPU access (docker: --gpus all; Kubernetes: a limit of \
                  nvidia.com/gpu)",
        })?;
        let table = Driver::load(&opened)?;
        let mut version: c_int = 0;
        // SAFETY: the pointer is valid for one c_int.
        let code = unsafe { (table.driver_version)(&mut version) };
        error::driver(&table, "cuDriverGetVersion", code)?;
        if version < OLDEST_DRIVER {
            return Err(Error::NoGpu {
                problem: format!(
                    "the driver offers CUDA {}, at least {} is needed",
                    version_text(version),
                    version_text(OLDEST_DRIVER)
                ),
                fix: "update the NVIDIA driver to 525 or newer".into(),
            });
        }
        // SAFETY: cuInit takes no pointer.
        match unsafe { (table.init)(0) } {
            NO_DEVICE => Err(Error::NoGpu {
                problem: "the driver shows none to this process (CUDA_ERROR_NO_DEVICE)".into(),
                fix: "check CUDA_VISIBLE_DEVICES, and the container's GPU access".into(),
            }),
            status => error::driver(&table, "cuInit", status),
        }?;
        Ok(table)
    })
}

/// The compiler.
pub(super) fn nvrtc() -> Result<&'static Nvrtc> {
    static TABLE: OnceLock<Nvrtc> = OnceLock::new();
    static OPENING: Mutex<()> = Mutex::new(());
    once(&TABLE, &OPENING, || {
        Nvrtc::load(&open(&Wanted {
            name: "libnvrtc",
            given: None,
            sonames: versioned("libnvrtc.so"),
            wheels: &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
            companions: "libnvrtc-builtins.so",
            oldest: OLDEST_TOOLKIT,
            fix: "`pip install nvidia-cuda-nvrtc` (nvidia-cuda-nvrtc-cu12 for a CUDA 12 driver), \
                  or point FERROTUNE_CUDA_LIBRARIES at the folder that has it, or point \
                  FERROTUNE_KERNELS at kernels compiled elsewhere",
        })?)
    })
}

/// The matrix products.
pub(super) fn cublaslt() -> Result<&'static CublasLt> {
    static TABLE: OnceLock<CublasLt> = OnceLock::new();
    static OPENING: Mutex<()> = Mutex::new(());
    once(&TABLE, &OPENING, || {
        CublasLt::load(&open(&Wanted {
            name: "libcublasLt",
            given: None,
            sonames: versioned("libcublasLt.so"),
            wheels: &["nvidia/cu13/lib", "nvidia/cublas/lib"],
            companions: "",
            oldest: OLDEST_TOOLKIT,
            fix: "`pip install nvidia-cublas` (nvidia-cublas-cu12 for a CUDA 12 driver), or point \
                  FERROTUNE_CUDA_LIBRARIES at the folder that has it",
        })?)
    })
}

/// The table, made once; a failure is not remembered.
fn once<T: Send + Sync>(
    table: &'static OnceLock<T>,
    opening: &Mutex<()>,
    open: impl FnOnce() -> Result<T>,
) -> Result<&'static T> {
    if let Some(table) = table.get() {
        return Ok(table);
    }
    let _only = opening.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(table) = table.get() {
        return Ok(table);
    }
    let made = open()?;
    Ok(table.get_or_init(|| made))
}

/// The sonames of a toolkit library. What is newer than the driver may not run on it, so it comes
/// last.
fn versioned(stem: &str) -> Vec<String> {
    let supported = driver_major().unwrap_or(u32::MAX);
    let mut majors = [13, 12];
    majors.sort_by_key(|&major| (major > supported, std::cmp::Reverse(major)));
    majors
        .iter()
        .map(|major| format!("{stem}.{major}"))
        .collect()
}

/// Major version of the CUDA that the driver offers, if there is a driver.
fn driver_major() -> Option<u32> {
    let table = driver().ok()?;
    let mut version: c_int = 0;
    // SAFETY: the pointer is valid for one c_int.
    let code = unsafe { (table.driver_version)(&mut version) };
    (code == 0).then_some(u32::try_from(version / 1000).ok()?)
}

fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Opens a library of NVIDIA's, for the life of the process: where `wanted` says, else in the folder of
/// [`set_library_directory`] or `FERROTUNE_CUDA_LIBRARIES`, by the names the system loader knows, and
/// where pip, conda and the toolkit put libraries.
///
/// # Errors
/// If it is in none of these places; the message has every path tried, and why it did not do.
pub fn open(wanted: &Wanted) -> Result<Opened> {
    let mut tried = Vec::new();
    for path in candidates(wanted) {
        if path.components().count() > 1 {
            if !path.exists() {
                tried.push(format!("{}: no such file", path.display()));
                continue;
            }
            preload(&path, wanted.companions);
        }
        // SAFETY: loading runs the library's initialisers; the names are NVIDIA's own.
        match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                return Ok(Opened {
                    library: ManuallyDrop::new(library),
                    path,
                    oldest: wanted.oldest,
                });
            }
            Err(error) => tried.push(format!("{}: {}", path.display(), reason(&error))),
        }
    }
    Err(Error::Library {
        library: wanted.name.into(),
        problem: format!("not found; tried\n  {}", tried.join("\n  ")),
        fix: wanted.fix.into(),
    })
}

/// Opens what the library at `path` will ask the loader for by bare name: NVRTC's builtins lie
/// beside it, where the loader does not look, unless they are loaded already.
fn preload(path: &Path, prefix: &str) {
    if prefix.is_empty() {
        return;
    }
    let entries = path.parent().and_then(|folder| fs::read_dir(folder).ok());
    for entry in entries.into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            let path = entry.path();
            // SAFETY: as in `open`.
            let opened = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
            // It stays open; a failure shows when the compiler is used.
            if let Ok(library) = opened {
                std::mem::forget(library);
            }
        }
    }
}

/// What the loader said, without the name it starts with.
fn reason(error: &libloading::Error) -> String {
    use std::error::Error as _;
    let text = error
        .source()
        .map_or_else(|| error.to_string(), ToString::to_string);
    match text.split_once(": ") {
        Some((_, rest)) => rest.to_owned(),
        None => text,
    }
}

/// Absolute paths and bare sonames, in the order they are tried.
fn candidates(wanted: &Wanted) -> Vec<PathBuf> {
    if let Some(given) = &wanted.given {
        return if given.is_dir() {
            in_folder(given, wanted)
        } else {
            vec![given.clone()]
        };
    }
    let mut paths = Vec::new();
    let given = DIRECTORY.get().cloned();
    let given = given.or_else(|| env::var_os(DIRECTORY_VARIABLE).map(PathBuf::from));
    for folder in given.iter().filter_map(|path| path.canonicalize().ok()) {
        paths.extend(in_folder(&folder, wanted));
    }
    paths.extend(wanted.sonames.iter().map(PathBuf::from));
    for folder in known_folders(wanted) {
        paths.extend(
            wanted
                .sonames
                .iter()
                .map(|name| folder.join(name))
                .filter(|path| path.exists()),
        );
    }
    paths
}

/// The library in `folder` itself, and in its wheels if it is a pip root.
fn in_folder(folder: &Path, wanted: &Wanted) -> Vec<PathBuf> {
    let places = std::iter::once("").chain(wanted.wheels.iter().copied());
    let names = |place| {
        let folder = folder.join(place);
        wanted.sonames.iter().map(move |name| folder.join(name))
    };
    places.flat_map(names).collect()
}

/// Folders outside the loader's path that may hold a toolkit library.
fn known_folders(wanted: &Wanted) -> Vec<PathBuf> {
    if wanted.wheels.is_empty() {
        return Vec::new();
    }
    let variable = |name: &str| env::var_os(name).map(PathBuf::from);
    let beside = env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_owned));
    let mut folders = Vec::new();
    let mut roots = Vec::new();
    if let Some(beside) = &beside {
        folders.extend([beside.clone(), beside.join("../lib")]);
        roots.push(beside.clone());
    }
    let prefixes = [
        beside.map(|b| b.join("..")),
        variable("VIRTUAL_ENV"),
        variable("CONDA_PREFIX"),
    ];
    for prefix in prefixes.into_iter().flatten() {
        roots.extend(site_packages(&prefix));
        folders.push(prefix.join("lib"));
    }
    for root in roots {
        folders.extend(wanted.wheels.iter().map(|wheel| root.join(wheel)));
    }
    for toolkit in [
        variable("CUDA_HOME"),
        variable("CUDA_PATH"),
        Some("/usr/local/cuda".into()),
    ] {
        folders.extend(toolkit.map(|toolkit| toolkit.join("lib64")));
    }
    folders
}

/// `PREFIX/lib/python3.X/site-packages`, newest Python first.
fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(prefix.join("lib"));
    let mut found: Vec<PathBuf> = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path().join("site-packages"))
        .collect();
    found.sort();
    found.reverse();
    found
}

/// The text at a pointer that a library returned.
///
/// # Safety
/// `text` is null or a NUL-terminated string that lives while it is copied.
pub(super) unsafe fn text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller vouches for it.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::{Wanted, open};
    use crate::ErrorKind;

    #[test]
    fn a_missing_library_names_what_was_tried_and_what_helps() {
        let wanted = Wanted {
            name: "libmissing",
            given: None,
            sonames: vec!["libferrotune-missing.so.13".into()],
            wheels: &["nvidia/missing/lib"],
            companions: "",
            oldest: "CUDA 12",
            fix: "install it",
        };
        let Err(error) = open(&wanted) else {
            panic!("there is no such library");
        };
        assert_eq!(error.kind(), ErrorKind::Environment);
        let text = error.to_string();
        assert!(text.starts_with("libmissing: not found; tried\n"), "{text}");
        assert!(
            text.contains("libferrotune-missing.so.13: cannot open")
                || text.contains("libferrotune-missing.so.13: no such file"),
            "{text}"
        );
        assert!(text.ends_with("install it"), "{text}");
    }
}
