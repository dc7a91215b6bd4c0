//! SIGTERM, Ctrl-C and a closed terminal: finish the step, save, leave. A second one leaves at once.

use ferrotune::core::{Error, ExitCode, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{SigId, flag, low_level};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that the first signal sets.
#[derive(Debug)]
pub(super) struct Stop {
    flag: Arc<AtomicBool>,
    /// What makes the second signal leave at once.
    shutdowns: Vec<SigId>,
}

/// Sets a flag on the first signal from now on.
pub(super) fn on_signal() -> Result<Stop> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut shutdowns = Vec::new();
    let hangup = (!hangups_are_ignored()).then_some(SIGHUP);
    for signal in [SIGTERM, SIGINT].into_iter().chain(hangup) {
        // Order matters: the shutdown looks at the flag before the same signal sets it.
        let code = ExitCode::StoppedUnsaved as i32;
        let registered = flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))
            .and_then(|id| {
                shutdowns.push(id);
                flag::register(signal, Arc::clone(&stop))
            });
        registered.map_err(Error::read(PathBuf::from("signal handlers")))?;
    }
    Ok(Stop {
        flag: stop,
        shutdowns,
    })
}

/// Whether this process was started to outlive its terminal, as by `nohup`.
fn hangups_are_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (SIGHUP - 1) & 1 == 1)
}

impl Stop {
    /// Leaves further signals to somebody else; whether there was one already.
    pub(super) fn hand_over(self) -> bool {
        for id in self.shutdowns {
            low_level::unregister(id);
        }
        self.flag.load(Ordering::SeqCst)
    }
}

impl Deref for Stop {
    type Target = AtomicBool;

    fn deref(&self) -> &AtomicBool {
        &self.flag
    }
}
