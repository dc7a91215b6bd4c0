//! A connection between every two ranks.

use crate::membership::Timing;
use crate::rendezvous::Met;
use crate::store::{Control, Member};
use crate::wire::{
    Deadline, Gate, GreetError, JobToken, Subject, dial, greet, read_frame, send, tune_data,
};
use ferrotune_core::{Error, Result};
use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// All ranks are there, so connecting them takes seconds, if it works at all.
const CONNECT: Duration = Duration::from_secs(60);
const DIAL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);
/// A rank's number needs no more.
const IDENTITY: usize = 64;

/// By rank, the connection to each peer; none to this rank itself.
#[derive(Debug)]
pub(super) struct Mesh {
    streams: Vec<Option<TcpStream>>,
}

impl Mesh {
    pub(super) fn world_size(&self) -> usize {
        self.streams.len()
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = (usize, &TcpStream)> {
        self.streams
            .iter()
            .enumerate()
            .filter_map(|(peer, stream)| Some((peer, stream.as_ref()?)))
    }

    /// Ends every connection, which wakes whoever waits on one.
    pub(super) fn close(&self) {
        for (_, stream) in self.peers() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Connections that higher ranks have made so far.
type Arrived = Arc<(Mutex<BTreeMap<usize, TcpStream>>, Condvar)>;

/// Connects this rank to all others: it calls the lower ones, and the higher ones call it.
///
/// # Errors
/// [`Error::Transient`] if a rank cannot be reached, or is lost meanwhile.
pub(super) fn connect(rank: usize, met: Met, timing: &Timing) -> Result<(Control, Mesh)> {
    let Met {
        control,
        data,
        token,
    } = met;
    let deadline = Deadline::after(timing.rendezvous.min(CONNECT));
    let subject = Subject {
        purpose: "data".into(),
        job: control.meeting().to_owned(),
    };
    let arrived = Arrived::default();
    let for_gate = Arc::clone(&arrived);
    let gate = Gate::open(
        vec![data],
        subject.clone(),
        token.clone(),
        move |stream, from| {
            let deadline = Deadline::after(DIAL);
            match read_frame::<usize>(&stream, IDENTITY, &deadline) {
                Ok(peer) => {
                    let mut streams = lock(&for_gate.0);
                    streams.insert(peer, stream);
                    for_gate.1.notify_all();
                }
                Err(e) => tracing::debug!("data: {from}: {e}"),
            }
        },
    )
    .map_err(|e| {
        control.fail(
            None,
            format!("rank {rank} cannot take data connections: {e}"),
        )
    })?;
    let mut streams = BTreeMap::new();
    for peer in &control.members()[..rank] {
        streams.insert(
            peer.rank,
            call(&control, rank, peer, &subject, &token, &deadline)?,
        );
    }
    streams.append(&mut wait(&control, rank, &arrived, &deadline)?);
    drop(gate);
    for stream in streams.values() {
        tune_data(
            stream,
            timing.dead_after,
            timing.first_call.max(timing.call),
        )
        .map_err(|e| {
            control.fail(
                None,
                format!("rank {rank} cannot set up a data connection: {e}"),
            )
        })?;
    }
    let world = control.members().len();
    let mesh = Mesh {
        streams: (0..world).map(|peer| streams.remove(&peer)).collect(),
    };
    Ok((control, mesh))
}

/// Connects to a lower rank.
fn call(
    control: &Control,
    rank: usize,
    peer: &Member,
    subject: &Subject,
    token: &JobToken,
    deadline: &Deadline,
) -> Result<TcpStream> {
    loop {
        let attempt = (|| -> Result<TcpStream, GreetError> {
            let stream = dial(peer.data, deadline, DIAL)?;
            greet(&stream, subject, token, &deadline.within(DIAL))?;
            send(&stream, &rank)?;
            Ok(stream)
        })();
        let why = match attempt {
            Ok(stream) => return Ok(stream),
            Err(GreetError::Io(e)) => e.to_string(),
            Err(GreetError::Refused(refused)) => format!("it refuses this rank: {refused:?}"),
        };
        if let Some(message) = control.failure() {
            return Err(Error::Transient { message });
        }
        if deadline.has_passed() {
            let message = format!(
                "rank {rank} cannot connect to {peer} at {}: {why}. Data connections use a port of the \
                 system's choice; policies between pods must let it through",
                peer.data
            );
            return Err(control.fail(Some(peer.rank), message));
        }
        thread::sleep(PAUSE);
    }
}

/// Waits for the calls of all higher ranks.
fn wait(
    control: &Control,
    rank: usize,
    arrived: &Arrived,
    deadline: &Deadline,
) -> Result<BTreeMap<usize, TcpStream>> {
    let higher = &control.members()[rank + 1..];
    let mut streams = lock(&arrived.0);
    loop {
        let Some(missing) = higher.iter().find(|peer| !streams.contains_key(&peer.rank)) else {
            return Ok(std::mem::take(&mut streams));
        };
        if let Some(message) = control.failure() {
            return Err(Error::Transient { message });
        }
        if deadline.has_passed() {
            drop(streams);
            let message = format!(
                "{missing} did not connect to rank {rank} within {} s",
                deadline.elapsed().as_secs()
            );
            return Err(control.fail(Some(missing.rank), message));
        }
        let waited = arrived.1.wait_timeout(streams, deadline.left().min(PAUSE));
        streams = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
