//! Who this rank is, where rank 0 is, and how long to wait: what a launcher's environment boils down to.

use crate::wire::JobToken;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

/// A host name or address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// A name that the resolver knows, or an address without brackets.
    pub host: String,
    /// The port, 1 to 65535.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// One rank's place in its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Global rank, `0..world_size`.
    pub rank: usize,
    /// Number of ranks of the job.
    pub world_size: usize,
    /// Rank within the node, `0..local_world_size`.
    pub local_rank: usize,
    /// Ranks on this node.
    pub local_world_size: usize,
    /// Nodes of the job. With one, ranks meet on the loopback interface.
    pub nnodes: usize,
    /// This node, `0..nnodes`.
    pub node_rank: usize,
    /// Where rank 0 is.
    pub master: HostPort,
    /// The launcher's own store listens on the master's port (torchrun, Ray): the sixteen ports above it
    /// are tried instead.
    pub master_port_is_taken: bool,
    /// The address to listen on, instead of the one that leads to the master.
    pub bind: Option<IpAddr>,
    /// The launcher's name of the job, the same on every rank.
    pub job_id: String,
    /// How often the launcher has started the job anew, from 0.
    pub restart_attempt: u64,
    /// The secret that ranks of one job share.
    pub token: JobToken,
    /// Name of the launcher.
    pub launcher: String,
}

impl Membership {
    /// Rank `rank` of `world_size` on one machine, rank 0 listening on `port` of the loopback interface.
    #[must_use]
    pub fn on_one_machine(rank: usize, world_size: usize, port: u16, token: JobToken) -> Self {
        Self {
            rank,
            world_size,
            local_rank: rank,
            local_world_size: world_size,
            nnodes: 1,
            node_rank: 0,
            master: HostPort {
                host: "127.0.0.1".into(),
                port,
            },
            master_port_is_taken: false,
            bind: None,
            job_id: "local".into(),
            restart_attempt: 0,
            token,
            launcher: "local".into(),
        }
    }
}

/// What all ranks must have in common besides the launcher's view of the job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Model of the device that this rank computes on.
    pub device: String,
    /// Digest of the configuration.
    pub config_digest: String,
}

/// How long to wait for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Until every rank is there, from the call on.
    pub rendezvous: Duration,
    /// For how long a store that says no (wrong token, wrong job, rank taken, stale attempt) is asked again:
    /// what answers may be left over from an earlier start of the job.
    pub refusals: Duration,
    /// Between two signs of life, both ways, on the control connection.
    pub heartbeat: Duration,
    /// Silence after which a peer counts as lost.
    pub dead_after: Duration,
    /// For the first exchange, in which ranks still load models at different speeds.
    pub first_call: Duration,
    /// For every later exchange.
    pub call: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            rendezvous: Duration::from_secs(600),
            refusals: Duration::from_secs(20),
            heartbeat: Duration::from_millis(250),
            dead_after: Duration::from_secs(5),
            first_call: Duration::from_secs(600),
            call: Duration::from_secs(300),
        }
    }
}
