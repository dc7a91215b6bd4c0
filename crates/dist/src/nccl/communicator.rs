//! A communicator of NCCL, as the rank sees it: commands to the one thread that owns it.
//!
//! Every call of NCCL happens on that thread ([`super::worker`]), so nothing uses a communicator that
//! another thread has aborted. The rank waits for answers with a deadline of its own, so a call of NCCL
//! that blocks against its contract costs a thread and not the process.

use super::ffi::UniqueId;
use super::library::Library;
use super::worker::{self, Collective, Command, Operation, Start};
use crate::tcp;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::cuda::CudaDevice;
use std::fmt;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long after the deadline the thread may take to say that it has passed.
const GRACE: Duration = Duration::from_millis(250);
/// Longest wait for a communicator to end well: peers may be gone already.
pub(super) const FINISH: Duration = Duration::from_secs(5);

/// One rank of a communicator.
#[derive(Debug)]
pub(super) struct Communicator {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

/// What the rank, the thread and whoever may abort have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) timeout: Duration,
    peers: Option<tcp::AbortHandle>,
    abort_requested: Mutex<Option<String>>,
    failure: Mutex<Option<Failure>>,
}

/// Why a communicator is of no use any more.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) message: String,
    /// Trying again cannot help.
    pub(super) permanent: bool,
}

impl Failure {
    fn to_error(&self) -> Error {
        let message = self.message.clone();
        if self.permanent {
            Error::config("device", message)
        } else {
            Error::Transient { message }
        }
    }
}

impl Shared {
    pub(super) fn new(
        rank: usize,
        world_size: usize,
        timeout: Duration,
        peers: Option<tcp::AbortHandle>,
    ) -> Self {
        Self {
            rank,
            world_size,
            timeout,
            peers,
            abort_requested: Mutex::new(None),
            failure: Mutex::new(None),
        }
    }

    /// A failure of `what` on this rank.
    pub(super) fn failure(&self, what: impl fmt::Display, why: impl fmt::Display) -> Failure {
        Failure {
            message: format!("rank {} of {}: {what}: {why}", self.rank, self.world_size),
            permanent: false,
        }
    }

    /// Remembers the first failure.
    pub(super) fn fail(&self, failure: Failure) {
        lock(&self.failure).get_or_insert(failure);
    }

    /// Why somebody wants the communicator aborted, if somebody does.
    pub(super) fn abort_reason(&self) -> Option<String> {
        let requested = lock(&self.abort_requested).clone();
        requested.or_else(|| self.peers.as_ref()?.failure())
    }

    fn request_abort(&self, reason: &str) {
        lock(&self.abort_requested).get_or_insert_with(|| reason.to_owned());
    }

    fn check(&self) -> Result<()> {
        match &*lock(&self.failure) {
            Some(failure) => Err(failure.to_error()),
            None => Ok(()),
        }
    }
}

/// Aborts a communicator from any thread, such as the one that learns that a peer is gone.
#[derive(Clone, Debug)]
pub struct AbortHandle(Arc<Shared>);

impl AbortHandle {
    /// Ends what is in progress within a tenth of a second, with `reason` as its error. Does not wait.
    pub fn abort(&self, reason: &str) {
        self.0.request_abort(reason);
    }
}

impl Communicator {
    /// Joins the communicator `id` and waits until every rank has.
    ///
    /// # Errors
    /// [`Error::Transient`] if that takes longer than `shared` allows, or NCCL fails; [`Error::Config`] if
    /// it says that trying again cannot help.
    pub(super) fn join(
        library: Library,
        device: &Arc<CudaDevice>,
        id: UniqueId,
        shared: Shared,
    ) -> Result<Self> {
        let shared = Arc::new(shared);
        let (commands, inbox) = mpsc::channel();
        let (ready, started) = mpsc::channel();
        let start = Start {
            library,
            device: Arc::clone(device),
            id,
            shared: Arc::clone(&shared),
        };
        let thread = thread::Builder::new()
            .name(format!("nccl rank {}", shared.rank))
            .spawn(move || worker::run(start, &inbox, ready))
            .map_err(|error| shared.failure("starting a thread", error).to_error())?;
        let communicator = Self {
            shared,
            commands,
            thread: Some(thread),
        };
        communicator.answer(&started, "ncclCommInitRankConfig")?;
        Ok(communicator)
    }

    /// Begins a collective on `count` f32 values at `address`, after what operations have issued so far.
    ///
    /// # Errors
    /// The first failure of the communicator or the device.
    pub(super) fn begin(
        &self,
        device: &Arc<CudaDevice>,
        operation: Operation,
        address: u64,
        count: usize,
        place: (u64, u64),
    ) -> Result<()> {
        self.shared.check()?;
        let (sequence, step) = place;
        self.send(Command::Begin(Collective {
            operation,
            address,
            count,
            sequence,
            step,
            inputs: device.event()?,
        }))
    }

    /// Returns once everything begun is done.
    ///
    /// # Errors
    /// The first failure of the communicator, at the latest a quarter of a second after the deadline.
    pub(super) fn wait(&self) -> Result<()> {
        let (done, answer) = mpsc::channel();
        self.send(Command::Wait(done))?;
        self.answer(&answer, "collectives in progress")
    }

    /// Ends what is in progress, with `reason` as its error.
    pub(super) fn abort(&self, reason: &str) {
        self.shared.request_abort(reason);
    }

    pub(super) fn abort_handle(&self) -> AbortHandle {
        AbortHandle(Arc::clone(&self.shared))
    }

    fn send(&self, command: Command) -> Result<()> {
        match self.commands.send(command) {
            Ok(()) => Ok(()),
            Err(_) => Err(self.gone()),
        }
    }

    /// The thread's answer, or why there is none.
    fn answer(&self, answer: &mpsc::Receiver<()>, what: &str) -> Result<()> {
        match answer.recv_timeout(self.shared.timeout + GRACE) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => Err(self.gone()),
            Err(RecvTimeoutError::Timeout) => {
                let timeout = self.shared.timeout.as_secs_f64();
                let why =
                    format!("a call of NCCL that must not block has not returned in {timeout} s");
                self.shared.request_abort(&why);
                self.shared.fail(self.shared.failure(what, why));
                Err(self.gone())
            }
        }
    }

    /// Why the thread has ended.
    fn gone(&self) -> Error {
        let unknown = || {
            self.shared
                .failure("NCCL", "the thread that calls it has ended")
        };
        match self.shared.check() {
            Err(error) => error,
            Ok(()) => unknown().to_error(),
        }
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Communicator {
    /// Ends the communicator: well if nothing is in progress, else by aborting it. Waits for that a
    /// bounded time, and leaves it to its thread after that.
    fn drop(&mut self) {
        // If the thread has gone, there is nothing to end.
        let _ = self.commands.send(Command::Finish);
        let Some(thread) = self.thread.take() else {
            return;
        };
        let failed = self.shared.check().is_err();
        let patience = if failed { GRACE } else { FINISH + GRACE };
        let deadline = Instant::now() + patience;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        // A panic there has been printed; here it is no reason for another one.
        let _ = thread.join();
    }
}

/// The value, also if a thread panicked while it held the lock: every use leaves it whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
