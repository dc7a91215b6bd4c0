//! Ranks of ferrotune: groups of processes or threads that train one model together.
//!
//! [`env`](mod@env) tells a process which rank it is, and [`launch`] starts the ranks of a machine.
//! [`Local`] joins threads of one process through
//! shared memory. Rendezvous, TCP and NCCL are not here yet; see the roadmap in ARCHITECTURE.md.

#![warn(clippy::print_stdout)]

pub mod env;
pub mod launch;
mod local;

pub use local::Local;
