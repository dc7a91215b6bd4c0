//! Sums through the MPI that a site has, for networks that it knows best. Built with the feature `mpi`.
//!
//! Meeting, losing and stopping stay with the host group, as for NCCL: MPI carries the values of
//! all-reduces and broadcasts alone. It is called from one thread of its own, with values that the thread
//! owns, so a collective that never ends costs a thread and not the process.

#[cfg(feature = "mpi")]
mod group;
#[cfg(feature = "mpi")]
mod worker;

#[cfg(feature = "mpi")]
pub use group::Mpi;

use crate::tcp::AbortHandle;
use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, Result};
use std::time::Duration;

/// How MPI is used.
#[derive(Clone, Debug)]
pub struct MpiOptions {
    /// Longest wait for one collective.
    pub timeout: Duration,
    /// What learns first that a peer is lost; then nobody waits for a collective in progress.
    pub peers: Option<AbortHandle>,
}

/// What makes a group.
type Join = fn(Box<dyn ProcessGroup>, MpiOptions) -> Result<Box<dyn ProcessGroup>>;

/// A group that sums through MPI, over the ranks of `host`.
///
/// # Errors
/// [`Error::Config`] if this was built without the feature `mpi`, or mpirun started other ranks than `host`
/// has; [`Error::Transient`] if a rank does not arrive.
pub fn join(host: Box<dyn ProcessGroup>, options: MpiOptions) -> Result<Box<dyn ProcessGroup>> {
    let known: Option<Join> = None;
    #[cfg(feature = "mpi")]
    let known = known.or(Some(|host, options| Ok(Box::new(Mpi::new(host, options)?))));
    let Some(join) = known else {
        return Err(Error::config(
            "ddp_backend",
            "this ferrotune was built without MPI; build it with `--features mpi` beside the site's mpicc, or use gloo",
        ));
    };
    join(host, options)
}
