//! SIGTERM, Ctrl-C and a closed terminal: finish the step, save, leave. A second one leaves at once.

use ferrotune::core::{Error, ExitCode, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A signal that comes so soon after the first is the same request: whoever stops all processes of a job
/// reaches a rank directly and through its launcher.
const SAME_REQUEST: Duration = Duration::from_secs(2);

/// A flag that the first signal sets.
#[derive(Debug)]
pub(super) struct Stop {
    flag: Arc<AtomicBool>,
    handle: Handle,
}

/// Sets a flag on the first signal from now on, and leaves at once on a later one.
pub(super) fn on_signal() -> Result<Stop> {
    let failed = || Error::read(PathBuf::from("signal handlers"));
    let hangup = (!hangups_are_ignored()).then_some(SIGHUP);
    let caught = [SIGTERM, SIGINT].into_iter().chain(hangup);
    let mut signals = Signals::new(caught).map_err(failed())?;
    let handle = signals.handle();
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let listen = move || {
        let mut first = None;
        for _ in signals.forever() {
            stop.store(true, Ordering::SeqCst);
            let first = *first.get_or_insert_with(Instant::now);
            if first.elapsed() > SAME_REQUEST {
                low_level::exit(ExitCode::StoppedUnsaved as i32);
            }
        }
    };
    let thread = thread::Builder::new().name("signals".into());
    thread.spawn(listen).map_err(failed())?;
    Ok(Stop { flag, handle })
}

/// Leaves at once on a signal: what this process does has nothing to save, and the code of a process that
/// dies of SIGTERM would say that it had.
pub(super) fn leave_on_signal() -> Result<()> {
    let always = Arc::new(AtomicBool::new(true));
    for signal in [SIGTERM, SIGINT] {
        let code = ExitCode::StoppedUnsaved as i32;
        signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&always))
            .map_err(Error::read(PathBuf::from("signal handlers")))?;
    }
    Ok(())
}

/// A file that reaches the limit on its size (`ulimit -f`) is a write that fails, with its temporary cleaned up,
/// rather than the end of the process.
pub(super) fn outlive_full_files() -> Result<()> {
    let noted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGXFSZ, noted)
        .map_err(Error::read(PathBuf::from("signal handlers")))?;
    Ok(())
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
        self.handle.close();
        self.flag.load(Ordering::SeqCst)
    }
}

impl Deref for Stop {
    type Target = AtomicBool;

    fn deref(&self) -> &AtomicBool {
        &self.flag
    }
}
