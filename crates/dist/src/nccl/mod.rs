//! NCCL: sums and broadcasts of what lies on GPUs, beside a host group that carries everything else.
//!
//! ```text
//! rank's thread            group.rs    headers and totals through the host group; buckets by buckets.rs
//!   | commands             communicator.rs
//! thread of the communicator  worker.rs   every call of NCCL, on a stream of its own; watches
//!   | function pointers    ffi.rs, library.rs
//! libnccl.so.2             opened at run time
//! ```
//!
//! - **Nothing hangs.** NCCL is used without blocking, every wait has a deadline, and the thread that owns
//!   the communicator aborts it on an error of NCCL, a collective that is too old, or a request
//!   ([`AbortHandle`]). Errors name rank, collective, its number and step, and NCCL's own words.
//! - **Overlap.** A gradient that is final is summed while backward goes on, in buckets that are the same
//!   ones whether and when it is said ([`ferrotune_core::process_group::ProcessGroup::reduce_ready`]), so
//!   bits do not depend on it.
//! - **Before it starts**: [`preflight`] looks at what usually goes wrong.
//!
//! `unsafe` of this crate lives in this folder alone.

mod buckets;
mod communicator;
mod ffi;
mod group;
mod library;
pub mod preflight;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod worker;

pub use communicator::AbortHandle;
pub use group::{Nccl, NcclOptions};
pub use library::Version;
