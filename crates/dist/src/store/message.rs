//! What ranks and the store tell each other.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;

/// How a rank introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Announcement {
    pub(crate) launcher: String,
    pub(crate) job_id: String,
    pub(crate) restart_attempt: u64,
    pub(crate) nnodes: usize,
    pub(crate) node_rank: usize,
    pub(crate) local_rank: usize,
    pub(crate) local_world_size: usize,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) device: String,
    pub(crate) config_digest: String,
    pub(crate) version: String,
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// Where this rank takes data connections.
    pub(crate) data: SocketAddr,
}

impl Announcement {
    pub(crate) fn member(&self) -> Member {
        Member {
            rank: self.rank,
            host: self.host.clone(),
            pid: self.pid,
            data: self.data,
        }
    }
}

/// One rank, as the others know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) rank: usize,
    pub(crate) host: String,
    pub(crate) pid: u32,
    pub(crate) data: SocketAddr,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rank {} (host {}, pid {})",
            self.rank, self.host, self.pid
        )
    }
}

/// All ranks, once they are there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Table {
    /// Names this meeting of ranks: a connection left over from another one does not fit.
    pub(crate) meeting: String,
    /// By rank.
    pub(crate) members: Vec<Member>,
}

/// What a rank is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// The optimizer step it began last, from 0.
    pub(crate) step: Option<u64>,
    /// Exchanges it has begun.
    pub(crate) calls: u64,
    /// The exchange it is in, or was in last.
    pub(crate) operation: Option<String>,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            Some(step) => write!(f, "step {step}")?,
            None => f.write_str("before its first step")?,
        }
        match &self.operation {
            Some(operation) => write!(f, ", {operation} (call {})", self.calls),
            None => f.write_str(", no exchange yet"),
        }
    }
}

/// Why the store does not take a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    pub(crate) kind: RefusalKind,
    pub(crate) message: String,
}

/// What the one refused can do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RefusalKind {
    /// This value differs from rank 0's: trying again does not help.
    Mismatch(String),
    /// Another process has that rank.
    Duplicate,
    /// The store belongs to a newer attempt: this process is left over.
    Stale,
    /// The store belongs to an older attempt, and goes away.
    Ahead,
}

/// From a rank to the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum ToStore {
    Announce(Box<Announcement>),
    Pulse(Progress),
    BeginStep {
        step: u64,
        stop: bool,
    },
    /// The first failure that this rank saw, and whose fault it seems to be.
    Failed {
        suspect: Option<usize>,
        message: String,
    },
    Leave,
}

/// From the store to a rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum FromStore {
    Refused(Refusal),
    Table(Table),
    Pulse,
    /// The answer to `BeginStep`, and news for everyone once a rank was asked to stop.
    EndsBefore(Option<u64>),
    /// As above, not as an answer.
    StopAgreed(u64),
    Abort {
        message: String,
    },
    Leave,
}
