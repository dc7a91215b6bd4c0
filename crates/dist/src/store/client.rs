//! A rank's end of the control plane.

use super::link::{Outbox, next};
use super::message::{Announcement, FromStore, Member, Progress, Refusal, Table, ToStore};
use super::server::Server;
use crate::membership::Timing;
use crate::wire::{Deadline, Patience, tune_control};
use ferrotune_core::{Error, Result};
use std::fmt;
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

const STACK: usize = 256 << 10;
/// How long a rank that sees a failure waits for the store's word on whose it was.
const VERDICT: Duration = Duration::from_secs(1);
/// How often whoever waits for ranks says so.
const REPORT: Duration = Duration::from_secs(30);

/// The connection to the store, and on rank 0 the store itself.
#[derive(Debug)]
pub(crate) struct Control {
    rank: usize,
    shared: Arc<Shared>,
    outbox: Outbox,
    table: Table,
    server: Option<Server>,
}

/// Why there is no [`Control`].
#[derive(Debug)]
pub(crate) enum JoinError {
    /// The store said no.
    Refused(Refusal),
    /// The store went away; the words fit after "the store".
    Lost(String),
    /// Not everyone came in time, or a newer attempt has begun.
    Failed(Error),
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    progress: Mutex<Progress>,
    hook: Mutex<Option<Hook>>,
}

/// What happens as soon as the group has failed, on whatever thread learns it.
struct Hook(Box<dyn Fn() + Send>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

#[derive(Debug, Default)]
struct State {
    table: Option<Table>,
    refusal: Option<Refusal>,
    /// The answer to a `BeginStep`.
    answered: bool,
    stop_before: Option<u64>,
    failure: Option<String>,
    /// Rank 0 left: no answers any more.
    store_left: bool,
}

impl Control {
    /// Announces this rank over a connection that has proved the token, and waits for all others.
    pub(crate) fn join(
        stream: TcpStream,
        announcement: &Announcement,
        server: &mut Option<Server>,
        timing: &Timing,
        patience: &Patience<'_>,
    ) -> Result<Self, JoinError> {
        let lost = |e: std::io::Error| JoinError::Lost(format!("connection failed: {e}"));
        tune_control(&stream, timing.dead_after).map_err(lost)?;
        let stream = Arc::new(stream);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            progress: Mutex::default(),
            hook: Mutex::default(),
        });
        let for_writer = Arc::clone(&shared);
        let outbox = Outbox::start(&stream, timing.heartbeat, move || {
            ToStore::Pulse(for_writer.progress().clone())
        })
        .map_err(lost)?;
        outbox.post(&ToStore::Announce(Box::new(announcement.clone())));
        let for_reader = Arc::clone(&shared);
        let silence = timing.dead_after;
        thread::Builder::new()
            .name("control-reader".into())
            .stack_size(STACK)
            .spawn(move || for_reader.read(&stream, silence))
            .map_err(lost)?;
        let mut control = Self {
            rank: announcement.rank,
            shared,
            outbox,
            table: Table {
                meeting: String::new(),
                members: Vec::new(),
            },
            server: None,
        };
        control.table = control.wait_for_table(server.as_ref(), patience)?;
        control.server = server.take();
        Ok(control)
    }

    fn wait_for_table(
        &self,
        server: Option<&Server>,
        patience: &Patience<'_>,
    ) -> Result<Table, JoinError> {
        let deadline = &patience.deadline;
        let mut next_report = REPORT;
        let mut state = self.shared.lock();
        loop {
            if let Some(refusal) = state.refusal.take() {
                return Err(JoinError::Refused(refusal));
            }
            if let Some(why) = state.failure.take() {
                return Err(JoinError::Lost(why));
            }
            if let Some(table) = state.table.take() {
                return Ok(table);
            }
            if state.store_left {
                let why = "rank 0 gave up before all ranks were there".to_owned();
                return Err(JoinError::Lost(why));
            }
            if let Some(message) = server.and_then(Server::superseded) {
                let message = format!("a newer attempt of the job has begun: {message}");
                return Err(JoinError::Failed(Error::Transient { message }));
            }
            patience.check_stop().map_err(JoinError::Failed)?;
            if deadline.has_passed() {
                return Err(JoinError::Failed(too_late(server, deadline)));
            }
            if deadline.elapsed() >= next_report {
                next_report += REPORT;
                let seconds = deadline.elapsed().as_secs();
                match server {
                    Some(server) => tracing::warn!("after {seconds} s {}", server.missing()),
                    None => tracing::warn!("after {seconds} s not all ranks are there yet"),
                }
            }
            let pause = deadline.left().min(Duration::from_millis(200));
            let waited = self.shared.changed.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Every rank.
    pub(crate) fn members(&self) -> &[Member] {
        &self.table.members
    }

    /// A name for this meeting of ranks that no other has.
    pub(crate) fn meeting(&self) -> &str {
        &self.table.meeting
    }

    /// Does `act` as soon as the group fails, at once if it has.
    pub(crate) fn on_failure(&self, act: impl Fn() + Send + 'static) {
        let hook = Hook(Box::new(act));
        let failed = self.failure().is_some();
        if failed {
            (hook.0)();
        }
        *lock(&self.shared.hook) = Some(hook);
        // It may have failed in between; acting twice does no harm.
        if !failed && self.failure().is_some() {
            self.shared.run_hook();
        }
    }

    /// The first failure of the group, as this rank knows it.
    pub(crate) fn failure(&self) -> Option<String> {
        self.shared.lock().failure.clone()
    }

    /// Notes an exchange that begins, for heartbeats to tell.
    pub(crate) fn note_call(&self, calls: u64, operation: &'static str) {
        let mut progress = self.shared.progress();
        progress.calls = calls;
        match &mut progress.operation {
            Some(name) if name == operation => {}
            name => *name = Some(operation.to_owned()),
        }
    }

    /// See `ProcessGroup::begin_step`.
    pub(crate) fn begin_step(&self, step: u64, stop: bool, deadline: &Deadline) -> Result<bool> {
        let mut state = self.shared.lock();
        state.answered = false;
        self.outbox.post(&ToStore::BeginStep { step, stop });
        loop {
            // What was agreed holds, even if peers have ended and left since.
            if state.stop_before.is_some_and(|end| step >= end) {
                return Ok(true);
            }
            if let Some(message) = &state.failure {
                let message = message.clone();
                return Err(Error::Transient { message });
            }
            if state.answered {
                drop(state);
                self.shared.progress().step = Some(step);
                return Ok(false);
            }
            if state.store_left {
                drop(state);
                let message = format!("rank 0 left the group before step {step}");
                return Err(self.fail(Some(0), message));
            }
            if deadline.has_passed() {
                drop(state);
                let message = format!(
                    "rank {} waited {} s for the store's word on step {step}",
                    self.rank,
                    deadline.elapsed().as_secs()
                );
                return Err(self.fail(Some(0), message));
            }
            let waited = self.shared.changed.wait_timeout(state, deadline.left());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Tells the store of a failure, and returns what the group's first failure was.
    pub(crate) fn fail(&self, suspect: Option<usize>, message: String) -> Error {
        let mut state = self.shared.lock();
        if state.failure.is_none() && !state.store_left {
            let report = ToStore::Failed {
                suspect,
                message: message.clone(),
            };
            self.outbox.post(&report);
            let verdict = Deadline::after(VERDICT);
            while state.failure.is_none() && !state.store_left && !verdict.has_passed() {
                let waited = self.shared.changed.wait_timeout(state, verdict.left());
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        let message = match state.store_left {
            // Others follow rank 0: their ends are no news.
            true if suspect != Some(0) => format!("rank 0 left the group, then: {message}"),
            _ => message,
        };
        let message = state.failure.get_or_insert(message).clone();
        drop(state);
        self.shared.run_hook();
        Error::Transient { message }
    }

    /// As [`Control::fail`], without waiting for anyone.
    pub(crate) fn abort(&self, message: &str) {
        let mut state = self.shared.lock();
        if state.failure.is_none() {
            state.failure = Some(message.to_owned());
            let report = ToStore::Failed {
                suspect: None,
                message: message.to_owned(),
            };
            self.outbox.post(&report);
        }
        drop(state);
        self.shared.changed.notify_all();
        self.shared.run_hook();
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.outbox.post(&ToStore::Leave);
        self.outbox.flush();
        if let Some(server) = self.server.take() {
            // What this rank said last must have reached everyone before the store closes.
            let deadline = Deadline::after(VERDICT);
            while !server.has_left(self.rank) && !deadline.has_passed() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.outbox.cut();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }

    fn run_hook(&self) {
        if let Some(hook) = &*lock(&self.hook) {
            (hook.0)();
        }
    }

    /// Reads what the store says until it leaves or is lost.
    fn read(&self, stream: &TcpStream, silence: Duration) {
        loop {
            let message = next(stream, silence);
            let mut state = self.lock();
            let mut failed = false;
            match message {
                Ok(FromStore::Pulse) => continue,
                Ok(FromStore::Refused(refusal)) => state.refusal = Some(refusal),
                Ok(FromStore::Table(table)) => state.table = Some(table),
                Ok(FromStore::EndsBefore(step)) => {
                    state.answered = true;
                    state.stop_before = step;
                }
                Ok(FromStore::StopAgreed(step)) => state.stop_before = Some(step),
                Ok(FromStore::Abort { message }) => {
                    failed = true;
                    state.failure.get_or_insert(message);
                }
                Ok(FromStore::Leave) => state.store_left = true,
                Err(why) => {
                    // After a goodbye, an end is an end; after a refusal, nothing new.
                    failed = !state.store_left && state.refusal.is_none();
                    if failed {
                        let message = format!(
                            "rank 0, which holds the store, is lost: {why}; this rank: {}",
                            *self.progress()
                        );
                        state.failure.get_or_insert(message);
                    }
                    state.store_left = true;
                    drop(state);
                    self.changed.notify_all();
                    if failed {
                        self.run_hook();
                    }
                    return;
                }
            }
            drop(state);
            self.changed.notify_all();
            if failed {
                self.run_hook();
            }
        }
    }
}

/// Not all ranks came: the reader learns who is missing, and whether trying again can help.
fn too_late(server: Option<&Server>, deadline: &Deadline) -> Error {
    let seconds = deadline.elapsed().as_secs();
    let Some(server) = server else {
        let message = format!(
            "not all ranks announced themselves to rank 0 within {seconds} s; rank 0 names the missing ones"
        );
        return Error::Transient { message };
    };
    let message = format!("after {seconds} s {}", server.missing());
    match server.lasting_refusal() {
        Some(super::RefusalKind::Mismatch(key)) => Error::config(key, message),
        Some(_) => Error::config("rank", message),
        None => Error::Transient { message },
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
