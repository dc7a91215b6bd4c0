//! Finding and opening `libnccl.so.2` at run time, and the calls that need no communicator.
//!
//! Nothing is linked. The file (or folder) of the options, else of `FERROTUNE_NCCL_LIBRARY`, is the only
//! one that is tried if there is one; else the search of the CUDA libraries finds it
//! ([`ferrotune_kernels::cuda::open_library`]): by name, then in wheels beside the program, the virtual
//! environment, conda and the toolkit.

use super::ffi::{self, Api, Status, UniqueId};
use ferrotune_core::Result;
use ferrotune_kernels::Error;
use ferrotune_kernels::cuda::{OpenedLibrary, WantedLibrary, open_library};
use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Environment variable with the library, or the folder it lies in.
pub(super) const LIBRARY_VARIABLE: &str = "FERROTUNE_NCCL_LIBRARY";

/// The oldest release that has every function, and calls that do not block.
const OLDEST: Version = Version(21_800);
/// Releases in which ending a communicator that failed can crash the process, which then leaves with
/// another code than the one that asks for a restart.
const CRASHES_IN_ABORT: RangeInclusive<u32> = 22_803..=22_808;

const FIX: &str = "`pip install nvidia-nccl-cu13` (nvidia-nccl-cu12 for a CUDA 12 driver), or \
                   point FERROTUNE_NCCL_LIBRARY at the file";

/// A release of NCCL, as `ncclGetVersion` codes it: `major * 10000 + minor * 100 + patch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Up to 2.8 the code was major * 1000 + minor * 100 + patch.
        let major = if self.0 < 10_000 { 1_000 } else { 10_000 };
        let (minor, patch) = (self.0 % major / 100, self.0 % 100);
        write!(f, "{}.{minor}.{patch}", self.0 / major)
    }
}

impl Version {
    /// Refuses a release that is too old, or that crashes where an error is handled.
    fn check(self, path: &Path) -> Result<()> {
        let problem = if self < OLDEST {
            format!("is NCCL {self}, at least {OLDEST} is needed")
        } else if CRASHES_IN_ABORT.contains(&self.0) {
            format!(
                "is NCCL {self}, and 2.28.3 to 2.28.8 can crash when a communicator is aborted: a lost \
                 peer would end this process by a signal instead of an exit code that asks for a restart"
            )
        } else {
            return Ok(());
        };
        Err(refused(path, problem, "install another release").into())
    }
}

fn refused(path: &Path, problem: String, fix: &str) -> Error {
    Error::Library {
        library: path.display().to_string(),
        problem,
        fix: format!("{fix}: {FIX}"),
    }
}

/// The opened library.
#[derive(Clone)]
pub(super) struct Library {
    pub(super) api: Api,
    pub(super) version: Version,
    pub(super) path: PathBuf,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL {} at {}", self.version, self.path.display())
    }
}

/// Opens the library at `given`, or where it is usually found.
///
/// # Errors
/// If there is none, with every path tried; if it lacks a function; if its release is refused.
pub(super) fn open(given: Option<PathBuf>) -> Result<Library> {
    let opened = open_library(&WantedLibrary {
        name: "libnccl",
        given,
        sonames: vec!["libnccl.so.2".into()],
        wheels: &["nvidia/nccl/lib"],
        companions: "",
        oldest: "NCCL 2.18",
        fix: FIX,
    })?;
    let api = functions(&opened)?;
    let path = opened.path().to_owned();
    let mut code: c_int = 0;
    // SAFETY: the pointer is valid for one c_int.
    let status = unsafe { (api.get_version)(&mut code) };
    if status != ffi::SUCCESS {
        let problem = format!("does not say its release: {}", ffi::name(status));
        return Err(refused(&path, problem, "install another").into());
    }
    let version = Version(u32::try_from(code).unwrap_or(0));
    version.check(&path)?;
    Ok(Library { api, version, path })
}

fn functions(library: &OpenedLibrary) -> Result<Api> {
    // SAFETY: the types are those of nccl.h for these functions, which did not change from the oldest
    // release accepted on; the library stays open for the life of the process.
    unsafe {
        Ok(Api {
            get_version: library.symbol("ncclGetVersion")?,
            error_string: library.symbol("ncclGetErrorString")?,
            last_error: library.symbol("ncclGetLastError")?,
            unique_id: library.symbol("ncclGetUniqueId")?,
            init_rank: library.symbol("ncclCommInitRankConfig")?,
            async_error: library.symbol("ncclCommGetAsyncError")?,
            all_reduce: library.symbol("ncclAllReduce")?,
            broadcast: library.symbol("ncclBroadcast")?,
            finalize: library.symbol("ncclCommFinalize")?,
            destroy: library.symbol("ncclCommDestroy")?,
            abort: library.symbol("ncclCommAbort")?,
        })
    }
}

impl Library {
    /// A new id for one communicator; ranks listen for each other from now on.
    pub(super) fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; ffi::UNIQUE_ID_BYTES]);
        // SAFETY: the pointer is valid for one id.
        match unsafe { (self.api.unique_id)(&mut id) } {
            ffi::SUCCESS => Ok(id),
            status => Err(format!("ncclGetUniqueId: {}", self.describe(status))),
        }
    }

    /// A status in words, with what the library last complained about.
    pub(super) fn describe(&self, status: Status) -> String {
        // SAFETY: the string is static in the library.
        let meaning = unsafe { text((self.api.error_string)(status)) };
        // SAFETY: without a communicator it is the last error of the process; the string is the library's
        // own and is copied at once.
        let last = unsafe { text((self.api.last_error)(std::ptr::null_mut())) };
        let last = last.trim();
        let more = if last.is_empty() { "" } else { ": " };
        format!("{meaning} ({}){more}{last}", ffi::name(status))
    }
}

/// The text at a pointer that the library returned.
///
/// # Safety
/// `text` is null or a NUL-terminated string that lives while it is copied.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller vouches for it.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::testing::FakeLibrary;
    use super::*;
    use ferrotune_core::ExitCode;

    #[test]
    fn a_release_reads_as_people_write_it() {
        assert_eq!(Version(22_705).to_string(), "2.27.5");
        assert_eq!(Version(23_007).to_string(), "2.30.7");
        assert_eq!(Version(2_708).to_string(), "2.7.8");
    }

    #[test]
    fn releases_that_are_too_old_or_crash_in_abort_are_refused() {
        let check = |code: u32| Version(code).check(Path::new("libnccl.so.2"));
        for code in [21_800, 22_705, 22_802, 22_809, 23_007] {
            check(code).expect("works");
        }
        for (code, part) in [
            (2_708, "2.7.8, at least 2.18.0"),
            (21_799, "at least 2.18.0"),
            (22_803, "aborted"),
            (22_808, "aborted"),
        ] {
            let error = check(code).expect_err("refused");
            assert!(error.to_string().contains(part), "{error}");
            assert_eq!(error.exit_code(), ExitCode::BadConfig);
        }
    }

    #[test]
    fn the_release_is_asked_of_the_library_itself() {
        let fake = FakeLibrary::new("version 21000");
        let error = open(Some(fake.path())).expect_err("too old");
        assert!(error.to_string().contains("2.10.0"), "{error}");
        let fake = FakeLibrary::new("version 22705");
        let library = open(Some(fake.path())).expect("new enough");
        assert_eq!(library.version, Version(22_705));
        assert_eq!(library.path, fake.path());
        // A folder does as well as a file.
        let folder = fake.path().parent().map(Path::to_owned);
        open(folder).expect("it lies in this folder");
    }

    #[test]
    fn a_missing_library_names_every_path_tried() {
        let folder = tempfile::tempdir().expect("a folder");
        let missing = folder.path().join("libnccl.so.2");
        for given in [missing.clone(), folder.path().to_owned()] {
            let error = open(Some(given)).expect_err("there is none");
            let message = error.to_string();
            assert!(
                message.contains(&missing.display().to_string()),
                "{message}"
            );
            assert!(message.contains("pip install"), "{message}");
            assert_eq!(error.exit_code(), ExitCode::BadConfig);
        }
        let error = open(Some(folder.path().to_owned())).expect_err("there is none");
        let wheel = folder.path().join("nvidia/nccl/lib/libnccl.so.2");
        assert!(error.to_string().contains(&wheel.display().to_string()));
    }

    #[test]
    fn a_missing_function_is_named() {
        let fake = FakeLibrary::without_finalize();
        let error = open(Some(fake.path())).expect_err("a function is missing");
        let message = error.to_string();
        assert!(
            message.contains("has no function ncclCommFinalize"),
            "{message}"
        );
        assert!(message.contains("older than NCCL 2.18"), "{message}");
        assert_eq!(error.exit_code(), ExitCode::BadConfig);
    }
}
