//! Log lines that strangers can cause, at a bounded rate.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_secs(30);

/// Says the first event of each kind at once, then at most one line per kind and half minute.
#[derive(Debug, Default)]
pub(crate) struct RateLimit {
    kinds: Mutex<BTreeMap<&'static str, (Instant, u64)>>,
}

impl RateLimit {
    /// Warns of an event of this kind, unless one was reported just now.
    pub(crate) fn warn(&self, kind: &'static str, detail: &str) {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match kinds.get_mut(kind) {
            Some((last, unsaid)) if now.duration_since(*last) < PERIOD => *unsaid += 1,
            Some((last, unsaid)) => {
                tracing::warn!("{kind}: {detail} (and {unsaid} more since the last such line)");
                (*last, *unsaid) = (now, 0);
            }
            None => {
                tracing::warn!("{kind}: {detail}");
                kinds.insert(kind, (now, 0));
            }
        }
    }
}
