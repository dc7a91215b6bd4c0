//! How many threads this process computes with.

use ferrotune_core::process_group::Place;
use ferrotune_core::{Error, Result};
use std::error::Error as _;

/// Starts the pool of threads: `threads` of them, else one per core or as `RAYON_NUM_THREADS` says.
/// Results do not depend on their number.
///
/// # Errors
/// [`Error::Memory`] if the system does not give that many; [`Error::Config`] if another number was chosen
/// before, which cannot change any more.
pub fn start(threads: Option<usize>) -> Result<()> {
    let built = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or(0))
        .build_global();
    let Err(error) = built else {
        return Ok(());
    };
    if let Some(why) = error.source() {
        let what = threads.map_or("a thread per core".to_owned(), |n| format!("{n} threads"));
        let message = format!(
            "cannot start {what}: {why}; set num_threads lower, or raise the limit on processes (ulimit -u, a pod's pids)"
        );
        return Err(Error::Memory { message });
    }
    // There is a pool already.
    match threads {
        Some(wanted) if rayon::current_num_threads() != wanted => Err(Error::config(
            "num_threads",
            "can only be chosen once per process",
        )),
        _ => Ok(()),
    }
}

/// The number of threads of a rank at `place`: `chosen`, else its share of the cores where it has to share and
/// `RAYON_NUM_THREADS` does not say how.
pub(crate) fn share_of(place: Place, chosen: Option<usize>) -> Option<usize> {
    let decided = place.local_world_size == 1 || std::env::var_os("RAYON_NUM_THREADS").is_some();
    if chosen.is_some() || decided {
        return chosen;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Some((cores / place.local_world_size).max(1))
}
