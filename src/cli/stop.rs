//! SIGTERM and Ctrl-C: finish the step, save, leave. A second one leaves at once.

use ferrotune::core::{Error, ExitCode, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
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
    for signal in [SIGTERM, SIGINT] {
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
