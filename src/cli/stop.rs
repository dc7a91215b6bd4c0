//! SIGTERM and Ctrl-C: finish the step, save, leave. A second one leaves at once.

use ferrotune::core::{Error, ExitCode, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A flag that the first signal sets.
pub(super) fn on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // Order matters: the shutdown looks at the flag before the same signal sets it.
        let code = ExitCode::StoppedUnsaved as i32;
        let registered = flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))
            .and_then(|_| flag::register(signal, Arc::clone(&stop)));
        registered.map_err(Error::read(PathBuf::from("signal handlers")))?;
    }
    Ok(stop)
}
