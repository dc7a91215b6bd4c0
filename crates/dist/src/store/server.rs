//! The store's server: a thread per member, and none that waits for another.

use super::link::{Outbox, next};
use super::message::{Announcement, FromStore, RefusalKind, ToStore};
use super::roster::{Roster, Seated};
use crate::membership::Timing;
use crate::wire::{Gate, JobToken, Subject, tune_control};
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Serves until dropped. Then it says goodbye to everyone.
#[derive(Debug)]
pub(crate) struct Server {
    shared: Arc<Shared>,
    gate: Option<Gate>,
}

#[derive(Debug)]
struct Shared {
    timing: Timing,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    roster: Roster,
    outboxes: BTreeMap<u64, Outbox>,
    connections: u64,
    /// A newer attempt of the job announced itself, to a store that does not have all ranks yet.
    superseded: Option<String>,
    closed: bool,
}

impl Server {
    /// Serves on `listeners`. `host` is rank 0's announcement: what the others must agree with.
    /// `meeting` is a name that no other meeting has.
    pub(crate) fn open(
        listeners: Vec<TcpListener>,
        host: Announcement,
        meeting: String,
        token: JobToken,
        timing: &Timing,
    ) -> io::Result<Self> {
        let subject = subject(&host.job_id);
        let shared = Arc::new(Shared {
            timing: timing.clone(),
            state: Mutex::new(State {
                roster: Roster::new(host, meeting),
                outboxes: BTreeMap::new(),
                connections: 0,
                superseded: None,
                closed: false,
            }),
        });
        let for_gate = Arc::clone(&shared);
        let gate = Gate::open(listeners, subject, token, move |stream, from| {
            if let Err(e) = for_gate.serve(stream, from) {
                tracing::debug!("store: {from}: {e}");
            }
        })?;
        Ok(Self {
            shared,
            gate: Some(gate),
        })
    }

    /// Who is missing, and who was refused.
    pub(crate) fn missing(&self) -> String {
        self.shared.lock().roster.missing()
    }

    /// The value in which a refused rank differs for good, if there is one.
    pub(crate) fn lasting_refusal(&self) -> Option<RefusalKind> {
        let state = self.shared.lock();
        state.roster.lasting_refusal().map(|r| r.kind.clone())
    }

    /// Whether `rank` has said goodbye, or was never there.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        let state = self.shared.lock();
        state.roster.seats.get(&rank).is_none_or(|seat| seat.left)
    }

    /// Why this store should make room for that of a newer attempt.
    pub(crate) fn superseded(&self) -> Option<String> {
        self.shared.lock().superseded.clone()
    }
}

/// What a connection to the store of `job` is for.
pub(crate) fn subject(job: &str) -> Subject {
    Subject {
        purpose: "store".into(),
        job: job.into(),
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.gate = None;
        let mut outboxes = {
            let mut state = self.shared.lock();
            state.closed = true;
            std::mem::take(&mut state.outboxes)
        };
        for outbox in outboxes.values_mut() {
            outbox.post(&FromStore::Leave);
            outbox.close();
        }
        for outbox in outboxes.values_mut() {
            outbox.flush();
            outbox.cut();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves one member until its connection ends.
    fn serve(&self, stream: TcpStream, from: SocketAddr) -> io::Result<()> {
        tune_control(&stream, self.timing.dead_after)?;
        let stream = Arc::new(stream);
        let silence = self.timing.dead_after;
        let announcement = match next::<ToStore>(&stream, silence) {
            Ok(ToStore::Announce(announcement)) => *announcement,
            Ok(_) => return Err(io::Error::other("expected an announcement")),
            Err(why) => return Err(io::Error::other(why)),
        };
        let outbox = Outbox::start(&stream, self.timing.heartbeat, || FromStore::Pulse)?;
        let Some(connection) = self.seat(outbox, announcement) else {
            return Ok(());
        };
        tracing::debug!("store: connection {connection} from {from}");
        let why = loop {
            match next(&stream, silence) {
                Ok(message) => self.lock().receive(connection, message),
                Err(why) => break why,
            }
        };
        let outbox = self.lock().lose(connection, &why);
        drop(outbox);
        Ok(())
    }

    /// Seats a rank, and tells everyone if it was the last. Returns the number of its connection.
    fn seat(&self, mut outbox: Outbox, announcement: Announcement) -> Option<u64> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        let connection = state.connections;
        state.connections += 1;
        match state.roster.seat(connection, announcement) {
            Ok(seated) => {
                state.outboxes.insert(connection, outbox);
                if let Seated::Complete(table) = seated {
                    state.tell_all(&FromStore::Table(table));
                }
                Some(connection)
            }
            Err(refusal) => {
                if refusal.kind == RefusalKind::Ahead && !state.roster.is_complete() {
                    state.superseded = Some(refusal.message.clone());
                }
                drop(state);
                outbox.post(&FromStore::Refused(refusal));
                outbox.flush();
                None
            }
        }
    }
}

impl State {
    fn tell_all(&self, message: &FromStore) {
        for outbox in self.outboxes.values() {
            outbox.post(message);
        }
    }

    fn receive(&mut self, connection: u64, message: ToStore) {
        let Some((_, seat)) = self.roster.of_connection(connection) else {
            return;
        };
        seat.heard = Instant::now();
        match message {
            ToStore::Pulse(progress) => seat.progress = progress,
            ToStore::BeginStep { step, stop } => {
                if !stop {
                    seat.progress.step = Some(step);
                }
                self.begin_step(connection, step, stop);
            }
            ToStore::Failed { suspect, message } => {
                let about = suspect.map(|rank| format!("; {}", self.roster.last_heard(rank)));
                self.fail(format!("{message}{}", about.unwrap_or_default()));
            }
            ToStore::Leave => seat.left = true,
            ToStore::Announce(_) => {}
        }
    }

    fn begin_step(&mut self, connection: u64, step: u64, stop: bool) {
        let (ends_before, agreed_now) = self.roster.begin_step(step, stop);
        if let Some(outbox) = self.outboxes.get(&connection) {
            outbox.post(&FromStore::EndsBefore(ends_before));
        }
        if let (Some(step), true) = (ends_before, agreed_now) {
            self.tell_all(&FromStore::StopAgreed(step));
        }
    }

    /// A connection ended. Returns its outbox, to be closed without the lock.
    fn lose(&mut self, connection: u64, why: &str) -> Option<Outbox> {
        let complete = self.roster.is_complete();
        if let Some((rank, seat)) = self.roster.of_connection(connection) {
            let left = seat.left;
            if !complete {
                let member = seat.announcement.member();
                self.roster.seats.remove(&rank);
                if !left {
                    tracing::warn!("{member} went away before all ranks were there: {why}");
                }
            } else if !left && !self.closed {
                let last = self.roster.last_heard(rank);
                self.fail(format!("rank {rank} is lost: {why}; {last}"));
            }
        }
        self.outboxes.remove(&connection)
    }

    /// The first failure is everyone's.
    fn fail(&mut self, message: String) {
        if self.roster.failure.is_none() {
            self.roster.failure = Some(message.clone());
            self.tell_all(&FromStore::Abort { message });
        }
    }
}
