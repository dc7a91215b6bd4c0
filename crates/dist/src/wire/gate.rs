//! A listener that lets members in, and is not held up by anyone else.
//!
//! Each connection is greeted by a thread of its own, against a deadline. At most [`MAX_STRANGERS`] are
//! greeted at a time: one more, and the oldest is dropped. A member proves itself in milliseconds, so
//! however many connections sit idle, it gets through.

use super::handshake::{GreetError, JobToken, Refused, Subject, answer};
use super::{Deadline, RateLimit};
use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

const MAX_STRANGERS: usize = 64;
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Greeting takes little; hundreds of strangers should not take much.
const STACK: usize = 256 << 10;

/// What is done with a connection that has proved the token.
type Admit = dyn Fn(TcpStream, SocketAddr) + Send + Sync;

/// Listens until dropped.
#[derive(Debug)]
pub(crate) struct Gate {
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
}

struct Shared {
    subject: Subject,
    token: JobToken,
    closed: AtomicBool,
    strangers: Mutex<BTreeMap<u64, Arc<TcpStream>>>,
    log: RateLimit,
    admit: Box<Admit>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("subject", &self.subject)
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// Listens on `listeners`; `admit` gets each connection that knows `token` and means `subject`, on a
    /// thread of its own.
    pub(crate) fn open(
        listeners: Vec<TcpListener>,
        subject: Subject,
        token: JobToken,
        admit: impl Fn(TcpStream, SocketAddr) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let addresses = listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<io::Result<Vec<_>>>()?;
        let shared = Arc::new(Shared {
            subject,
            token,
            closed: AtomicBool::new(false),
            strangers: Mutex::default(),
            log: RateLimit::default(),
            admit: Box::new(admit),
        });
        let gate = Self { shared, addresses };
        for listener in listeners {
            let shared = Arc::clone(&gate.shared);
            thread::Builder::new()
                .name("gate".into())
                .spawn(move || accept_all(&shared, &listener))?;
        }
        Ok(gate)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        for address in &self.addresses {
            // An accept that waits sees the flag once there is something to accept.
            let _ = TcpStream::connect_timeout(address, Duration::from_millis(200));
        }
    }
}

fn accept_all(shared: &Arc<Shared>, listener: &TcpListener) {
    for id in 0.. {
        let accepted = listener.accept();
        if shared.closed.load(Ordering::SeqCst) {
            break;
        }
        match accepted {
            Ok((stream, from)) => meet(shared, id, stream, from),
            // Out of descriptors, or a caller that gave up: nothing that retrying at once would mend.
            Err(e) => {
                shared.log.warn("cannot accept connections", &e.to_string());
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
    for stranger in shared.lock().values() {
        let _ = stranger.shutdown(Shutdown::Both);
    }
}

/// Greets a new connection on a thread of its own.
fn meet(shared: &Arc<Shared>, id: u64, stream: TcpStream, from: SocketAddr) {
    let stream = Arc::new(stream);
    let mut strangers = shared.lock();
    if strangers.len() >= MAX_STRANGERS
        && let Some((_, oldest)) = strangers.pop_first()
    {
        let _ = oldest.shutdown(Shutdown::Both);
        let detail = format!("{MAX_STRANGERS} have not said who they are; the oldest is dropped");
        shared.log.warn("many unknown connections", &detail);
    }
    strangers.insert(id, Arc::clone(&stream));
    drop(strangers);
    let for_thread = Arc::clone(shared);
    let spawned = thread::Builder::new()
        .name("greeting".into())
        .stack_size(STACK)
        .spawn(move || {
            let greeted = greet_one(&for_thread, &stream, from);
            for_thread.lock().remove(&id);
            // The map's copy is gone, so this is the last one.
            if greeted && let Some(stream) = Arc::into_inner(stream) {
                (for_thread.admit)(stream, from);
            }
        });
    if let Err(e) = spawned {
        shared.lock().remove(&id);
        shared.log.warn("cannot start a thread", &e.to_string());
    }
}

fn greet_one(shared: &Shared, stream: &TcpStream, from: SocketAddr) -> bool {
    let deadline = Deadline::after(GREETING_TIME);
    let prepared = stream
        .set_nodelay(true)
        .and_then(|()| stream.set_write_timeout(Some(GREETING_TIME)));
    let greeted = prepared
        .map_err(GreetError::Io)
        .and_then(|()| answer(stream, &shared.subject, &shared.token, &deadline));
    let purpose = &shared.subject.purpose;
    match greeted {
        Ok(()) => return true,
        Err(GreetError::Refused(Refused::WrongToken)) => {
            let detail = format!("{from} does not know the token of this job ({purpose})");
            shared.log.warn("connection refused, wrong token", &detail);
        }
        Err(GreetError::Refused(Refused::WrongJob(job))) => {
            let here = &shared.subject.job;
            let detail = format!("{from} belongs to {job:?}, this is {here:?} ({purpose})");
            shared.log.warn("connection refused, wrong job", &detail);
        }
        Err(GreetError::Io(e)) if e.kind() == io::ErrorKind::InvalidData => {
            let detail = format!("{from}: {e} ({purpose})");
            shared.log.warn("connection refused, garbage", &detail);
        }
        Err(GreetError::Io(e)) if e.kind() == io::ErrorKind::TimedOut => {
            let detail = format!("{from} did not say who it is ({purpose})");
            shared.log.warn("connection dropped, silent", &detail);
        }
        // Probes of a health check, or a peer that went away: no news.
        Err(GreetError::Io(e)) => tracing::debug!("{from}: {e} ({purpose})"),
    }
    false
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Arc<TcpStream>>> {
        self.strangers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
