//! How many threads a rank computes with.

use ferrotune_core::config::TrainConfig;
use ferrotune_core::process_group::Place;
use ferrotune_core::{Error, Result};

/// The pool of threads; results do not depend on their number.
pub(super) fn set(config: &TrainConfig, place: Place) -> Result<()> {
    let Some(threads) = config.runtime.num_threads.or_else(|| cores_of(place)) else {
        return Ok(());
    };
    // A second run in one process keeps the first pool: its size cannot change any more.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global();
    if rayon::current_num_threads() == threads {
        return Ok(());
    }
    Err(Error::config(
        "num_threads",
        "can only be chosen once per process",
    ))
}

/// This rank's share of the cores, where it has to share and nobody has said how.
fn cores_of(place: Place) -> Option<usize> {
    if place.local_world_size == 1 || std::env::var_os("RAYON_NUM_THREADS").is_some() {
        return None;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Some((cores / place.local_world_size).max(1))
}
