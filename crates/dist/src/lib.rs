//! Ranks of ferrotune: groups of processes or threads that train one model together.
//!
//! [`Local`] joins threads of one process through shared memory; [`Nccl`] sums what lies on GPUs, beside
//! another group that carries everything else. Launcher environments, rendezvous and TCP are not here
//! yet; see the roadmap in ARCHITECTURE.md.

#![warn(clippy::print_stdout)]

mod local;
pub mod nccl;

pub use local::Local;
pub use nccl::Nccl;
