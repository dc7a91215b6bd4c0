//! The side of a rank: to end when its launcher is gone.

use crate::env::own::LAUNCHER_PID;
use rustix::process::{Pid, Signal, set_parent_process_death_signal, test_kill_process};

/// Makes the kernel end this process with its launcher, even if that one gets SIGKILL. Call it first
/// in `main`. Does nothing in a process that no launcher started.
///
/// Returns false if the launcher is gone already: there is nothing to do but to end.
#[must_use]
pub fn end_with_launcher() -> bool {
    let launcher = std::env::var(LAUNCHER_PID).ok();
    let launcher = launcher.and_then(|pid| pid.parse::<i32>().ok());
    let Some(launcher) = launcher.and_then(Pid::from_raw) else {
        return true;
    };
    let is_parent = || std::os::unix::process::parent_id() == launcher.as_raw_pid().unsigned_abs();
    if is_parent() {
        let asked = set_parent_process_death_signal(Some(Signal::KILL));
        // It may have ended before the kernel knew.
        return asked.is_err() || is_parent();
    }
    // A program that a rank started inherits the variable; its launcher is somewhere above it.
    test_kill_process(launcher).is_ok()
}
