//! Ranks as processes that exchange values over TCP: for hosts without GPUs, tests and small clusters.
//!
//! Every two ranks share a connection, so W ranks have W (W - 1) / 2: fine for tens of ranks, not for
//! thousands. Each call begins with everyone telling everyone what it is about to do and its totals; then
//! values go around a ring, down a tree, or straight to everyone. Losses of peers are the business of the
//! control plane ([`crate::store`]), which ends every wait as soon as one is known.

mod call;
mod exchanges;
mod mesh;
mod pump;
mod ring;
#[cfg(test)]
mod tests;

use crate::membership::{Membership, Timing, Work};
use crate::rendezvous::meet;
use crate::store::Control;
use crate::wire::{Deadline, JobToken};
use call::{Call, Operation};
use exchanges::{Broadcast, Gather, OpeningSpace};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, Result};
use mesh::Mesh;
use pump::{Exchange, Fault};
use ring::{Ring, SCRATCH};
use std::net::TcpListener;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::thread;

/// One rank of a group of processes that are connected by TCP.
///
/// After an error every later call fails with the same message. Dropping it says goodbye to the others; a
/// process that ends without doing so counts as lost.
#[derive(Debug)]
pub struct Tcp {
    rank: usize,
    world_size: usize,
    /// None in a group of one.
    links: Option<Links>,
    timing: Timing,
    calls: u64,
    step: Option<u64>,
    opening: OpeningSpace,
    scratch: Vec<f32>,
}

#[derive(Debug)]
struct Links {
    control: Arc<Control>,
    mesh: Arc<Mesh>,
}

/// Ends the calls of a [`Tcp`] group from another thread.
#[derive(Clone, Debug)]
pub struct AbortHandle {
    control: Weak<Control>,
}

impl AbortHandle {
    /// Fails the group, here and on every other rank, with this message. A call that waits returns at once.
    pub fn abort(&self, why: &str) {
        if let Some(control) = self.control.upgrade() {
            control.abort(why);
        }
    }

    /// The first failure of the group, as this rank knows it: a peer lost, an abort, here or elsewhere.
    /// None in a group of one, and once the group is dropped.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.control.upgrade()?.failure()
    }
}

impl Tcp {
    /// Meets the other ranks and connects to each. Rank 0 serves the store from now on. `stop`, set by a signal,
    /// ends the wait for ranks that are not there yet.
    ///
    /// # Errors
    /// [`Error::Config`] if ranks do not fit together: another token, job, version, world size, device or
    /// configuration, or a rank that is taken. [`Error::Transient`] if they do not all come in time,
    /// [`Error::Stopped`] if `stop` is set before they have.
    pub fn join(
        membership: &Membership,
        work: &Work,
        timing: &Timing,
        stop: &AtomicBool,
    ) -> Result<Self> {
        Self::join_with(membership, work, timing, Vec::new(), stop)
    }

    /// All ranks of a group of `world_size`, in this process, over loopback.
    ///
    /// # Errors
    /// [`Error::Transient`] if sockets or threads run out.
    pub fn local_group(world_size: usize, timing: &Timing) -> Result<Vec<Self>> {
        let failed = |e: std::io::Error| Error::Transient {
            message: format!("cannot set up ranks on the loopback interface: {e}"),
        };
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let token = JobToken::random().map_err(failed)?;
        let mut listener = Some(listener);
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..world_size)
                .map(|rank| {
                    let membership =
                        Membership::on_one_machine(rank, world_size, port, token.clone());
                    let listeners = listener.take().into_iter().collect();
                    scope.spawn(move || {
                        let stop = AtomicBool::new(false);
                        Self::join_with(&membership, &Work::default(), timing, listeners, &stop)
                    })
                })
                .collect();
            ranks
                .into_iter()
                .map(|rank| {
                    rank.join().unwrap_or_else(|_| {
                        Err(Error::Transient {
                            message: "the thread of a rank panicked".into(),
                        })
                    })
                })
                .collect()
        })
    }

    fn join_with(
        membership: &Membership,
        work: &Work,
        timing: &Timing,
        listeners: Vec<TcpListener>,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let (rank, world_size) = (membership.rank, membership.world_size);
        let links = if world_size > 1 {
            let met = meet(membership, work, timing, listeners, stop)?;
            let (control, mesh) = mesh::connect(rank, met, timing)?;
            let mesh = Arc::new(mesh);
            let for_hook = Arc::clone(&mesh);
            control.on_failure(move || for_hook.close());
            Some(Links {
                control: Arc::new(control),
                mesh,
            })
        } else {
            None
        };
        Ok(Self {
            rank,
            world_size,
            links,
            timing: timing.clone(),
            calls: 0,
            step: None,
            opening: OpeningSpace::default(),
            scratch: vec![0.0; if world_size > 1 { SCRATCH } else { 0 }],
        })
    }

    /// A handle that ends this group's calls from another thread.
    #[must_use]
    pub fn abort_handle(&self) -> AbortHandle {
        let control = self.links.as_ref().map(|l| Arc::downgrade(&l.control));
        AbortHandle {
            control: control.unwrap_or_default(),
        }
    }

    /// Tells everyone what this rank is about to do. None in a group of one, where nothing is left to do.
    fn open(
        &mut self,
        operation: Operation,
        totals: &mut [f64],
        bytes: usize,
    ) -> Result<Option<Active<'_>>> {
        let Some(Links { control, mesh }) = &self.links else {
            return Ok(None);
        };
        let call = Call::new(self.calls, self.step, operation, totals.len(), bytes);
        let limit = match self.calls {
            0 => self.timing.first_call,
            _ => self.timing.call,
        };
        self.calls += 1;
        control.note_call(self.calls, operation.name());
        let active = Active {
            rank: self.rank,
            world: self.world_size,
            control,
            mesh,
            call,
            deadline: Deadline::after(limit),
            opening: &mut self.opening,
            scratch: &mut self.scratch,
        };
        if let Some(message) = control.failure() {
            return Err(Error::Transient { message });
        }
        let mut opening = active
            .opening
            .open(call, totals, self.rank, self.world_size);
        let opened = pump::run(mesh, &mut opening, &active.deadline, &|| {
            control.failure().is_some()
        });
        opened.map_err(|fault| active.explain(fault))?;
        active.opening.sum_totals(totals);
        Ok(Some(active))
    }
}

/// A call that all ranks have agreed on.
struct Active<'a> {
    rank: usize,
    world: usize,
    control: &'a Control,
    mesh: &'a Mesh,
    call: Call,
    deadline: Deadline,
    opening: &'a mut OpeningSpace,
    scratch: &'a mut [f32],
}

impl Active<'_> {
    fn run(&self, exchange: &mut impl Exchange) -> Result<()> {
        run(
            self.control,
            self.mesh,
            &self.call,
            self.rank,
            &self.deadline,
            exchange,
        )
    }

    fn explain(&self, fault: Fault) -> Error {
        explain(self.control, &self.call, self.rank, &self.deadline, fault)
    }
}

fn run(
    control: &Control,
    mesh: &Mesh,
    call: &Call,
    rank: usize,
    deadline: &Deadline,
    exchange: &mut impl Exchange,
) -> Result<()> {
    pump::run(mesh, exchange, deadline, &|| control.failure().is_some())
        .map_err(|fault| explain(control, call, rank, deadline, fault))
}

/// Tells the group of a fault, and returns the group's first failure.
fn explain(
    control: &Control,
    call: &Call,
    rank: usize,
    deadline: &Deadline,
    fault: Fault,
) -> Error {
    match fault {
        Fault::Lost { peer, why } => control.fail(
            Some(peer),
            format!("rank {peer} {why} to rank {rank} during {call}"),
        ),
        Fault::Late { peer } => control.fail(
            Some(peer),
            format!(
                "rank {rank} waited {:.1} s for rank {peer} in {call}",
                deadline.elapsed().as_secs_f64()
            ),
        ),
        Fault::Diverged { peer, theirs } => control.fail(
            None,
            format!("ranks diverged: rank {rank} asks for {call}, rank {peer} for {theirs}"),
        ),
        Fault::Aborted => control.fail(None, "the group was aborted".into()),
        Fault::Local(why) => control.fail(None, format!("rank {rank} in {call}: {why}")),
    }
}

impl ProcessGroup for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn begin_step(&mut self, step: u64, stop: bool) -> Result<bool> {
        let ends = match &self.links {
            Some(links) => {
                let deadline = Deadline::after(self.timing.call);
                links.control.begin_step(step, stop, &deadline)?
            }
            None => stop,
        };
        if !ends {
            self.step = Some(step);
        }
        Ok(ends)
    }

    fn all_reduce(&mut self, buffer: &mut FlatBuffer, totals: &mut [f64]) -> Result<()> {
        let values = buffer.as_mut_slice();
        let Some(active) = self.open(Operation::AllReduce, totals, size_of_val(values))? else {
            return Ok(());
        };
        let Active {
            rank,
            world,
            control,
            mesh,
            call,
            deadline,
            scratch,
            ..
        } = active;
        let mut ring = Ring::new(rank, world, values, scratch);
        run(control, mesh, &call, rank, &deadline, &mut ring)
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let rank = self.rank;
        let Some(active) = self.open(Operation::AllGather, &mut [], bytes.len())? else {
            return Ok(vec![bytes.to_vec()]);
        };
        let mut gather = Gather::new(bytes, rank, active.opening.calls())
            .map_err(|fault| active.explain(fault))?;
        active.run(&mut gather)?;
        Ok(gather.all)
    }

    fn broadcast(&mut self, buffer: &mut FlatBuffer) -> Result<()> {
        let (rank, world) = (self.rank, self.world_size);
        let values = buffer.as_mut_slice();
        let Some(active) = self.open(Operation::Broadcast, &mut [], size_of_val(values))? else {
            return Ok(());
        };
        active.run(&mut Broadcast::new(
            rank,
            world,
            bytemuck::cast_slice_mut(values),
        ))
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        let Some(Links { control, mesh }) = self.links.take() else {
            return;
        };
        // The goodbye first: whoever sees a connection end then knows why.
        drop(control);
        mesh.close();
    }
}
