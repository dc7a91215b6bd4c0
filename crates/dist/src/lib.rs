//! Ranks of ferrotune: groups of processes or threads that train one model together.
//!
//! [`Local`] joins threads of one process through shared memory. [`Tcp`] joins processes: they meet at a
//! store on rank 0, which also notices who is lost, and exchange values over TCP. Who is who comes in as a
//! [`Membership`]. Launcher environments and NCCL are not here yet; see the roadmap in ARCHITECTURE.md.

#![warn(clippy::print_stdout)]

mod local;
mod measure;
mod membership;
mod rendezvous;
mod store;
mod tcp;
mod wire;

pub use local::Local;
pub use measure::measure_all_reduce;
pub use membership::{HostPort, Membership, Timing, Work};
pub use tcp::{AbortHandle, Tcp};
pub use wire::JobToken;
