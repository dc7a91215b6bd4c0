//! The ranks of one machine as processes: started, watched, stopped together.
//!
//! A pod that has several ranks runs this program once; it starts itself again for each rank, so
//! nothing else has to be there to launch it. [`supervise`] passes signals on, reaps what ends, ends
//! the other ranks when one fails, and gives the exit code of the rank that failed first.

mod child;
mod output;
mod ranks;
mod supervisor;
#[cfg(test)]
mod tests;
mod verdict;

pub use child::end_with_launcher;

use crate::env::LaunchEnv;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// How long ranks get to end by themselves after another one failed, before SIGKILL.
pub const GRACE: Duration = Duration::from_secs(5);
/// The same after a rank that stopped as asked: the others may be writing a checkpoint.
pub const STOP_GRACE: Duration = Duration::from_secs(30);

/// What to start for each rank of this machine.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, the same for every rank.
    pub arguments: Vec<OsString>,
    /// Variables for every rank, such as those of `nccl::preflight`.
    pub variables: BTreeMap<String, String>,
    /// As [`GRACE`].
    pub grace: Duration,
}

/// Why ranks could not be started. Exit code 71 for a lack of processes or memory, else 70.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {what}: {source}")]
pub struct LaunchError {
    what: String,
    source: std::io::Error,
}

impl LaunchError {
    /// The exit code for the scheduler.
    #[must_use]
    pub fn exit_code(&self) -> ferrotune_core::ExitCode {
        match self.source.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::OutOfMemory => {
                ferrotune_core::ExitCode::OutOfMemory
            }
            _ => ferrotune_core::ExitCode::Internal,
        }
    }

    fn of(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        |source| Self { what, source }
    }
}

/// Starts the ranks that `found` gives to this machine, and returns when none is left: the exit code
/// of the whole.
///
/// Rank 0 writes to standard output and standard error as it is; what others write comes out on
/// standard error, each line behind `[rank N]`. Call it on the main thread: ranks end when the thread
/// that started them does.
///
/// # Errors
/// If a rank cannot be started; those that were are ended.
pub fn supervise(launch: &Launch, found: &LaunchEnv) -> Result<u8, LaunchError> {
    let signals = supervisor::Signals::listen()?;
    let ranks = ranks::start(launch, found)?;
    Ok(supervisor::watch(ranks, &signals, launch.grace))
}
