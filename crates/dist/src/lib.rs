//! Ranks of ferrotune: groups of processes or threads that train one model together.
//!
//! [`Local`] joins threads of one process through shared memory. Launcher environments,
//! rendezvous, TCP and NCCL are not here yet; see the roadmap in ARCHITECTURE.md.

#![warn(clippy::print_stdout)]

mod local;

pub use local::Local;
