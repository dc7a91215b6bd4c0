//! Ranks of ferrotune: groups of processes or threads that train one model together.
//!
//! [`env`](mod@env) tells a process which rank it is, and [`launch`] starts the ranks of a machine.
//! [`Local`] joins threads of one process through shared memory. [`Tcp`] joins processes: they meet at a
//! store on rank 0, which also notices who is lost, and exchange values over TCP. [`Nccl`] sums what lies on
//! GPUs, beside another group that carries everything else; so does [`mpi`] on hosts, with the
//! feature of that name. Who is who comes in as a [`Membership`].

#![warn(clippy::print_stdout)]

mod agreement;
pub mod env;
pub mod launch;
mod local;
mod measure;
mod membership;
pub mod mpi;
pub mod nccl;
mod rendezvous;
mod store;
mod tcp;
mod wire;

pub use local::Local;
pub use measure::measure_all_reduce;
pub use membership::{HostPort, Membership, Timing, Work};
pub use nccl::Nccl;
pub use tcp::{AbortHandle, Tcp};
pub use wire::JobToken;
