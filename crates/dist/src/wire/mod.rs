//! What both connections of a rank have in common: frames, the proof of a shared token, sockets.
//!
//! Nothing is encrypted. The proof keeps strangers out; it does not protect from someone who can read or
//! change packets on their way.

mod frame;
mod gate;
mod handshake;
mod log;
mod socket;

pub use handshake::JobToken;

pub(crate) use frame::{MAX_MEMBER_FRAME, frame, read_frame, send};
pub(crate) use gate::Gate;
pub(crate) use handshake::{GreetError, Refused, Subject, greet, nonce};
pub(crate) use log::RateLimit;
pub(crate) use socket::{dial, tune_control, tune_data};

use ferrotune_core::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What ends a wait for other ranks at the start: time, or a signal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience<'a> {
    pub(crate) deadline: Deadline,
    pub(crate) stop: &'a AtomicBool,
}

impl Patience<'_> {
    /// # Errors
    /// [`Error::Stopped`] if there was a signal.
    pub(crate) fn check_stop(&self) -> Result<()> {
        if !self.stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Error::Stopped {
            during: "while waiting for other ranks".into(),
        })
    }
}

/// A point in time that a whole sequence of waits shares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    begin: Instant,
    end: Instant,
}

impl Deadline {
    pub(crate) fn after(time: Duration) -> Self {
        let begin = Instant::now();
        // A wait of thirty years is as good as one that never ends, and does not overflow.
        let time = time.min(Duration::from_secs(1_000_000_000));
        Self {
            begin,
            end: begin + time,
        }
    }

    /// Time left; zero once it has passed.
    pub(crate) fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    pub(crate) fn has_passed(&self) -> bool {
        self.left().is_zero()
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    /// What comes first: this, or `time` from now.
    pub(crate) fn within(&self, time: Duration) -> Self {
        Self::after(self.left().min(time))
    }
}
