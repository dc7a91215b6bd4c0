//! The thread that owns a communicator: it makes every call of NCCL, and watches.
//!
//! Calls do not block (`blocking = 0`): each is followed by polling until it has ended. Between commands,
//! every 100 ms, the thread looks for errors that NCCL learned of by itself, for a request to abort, and
//! at the age of the oldest collective. Whatever it finds, it first tells the rank and then aborts the
//! communicator, which may take its time.

use super::communicator::{FINISH, Failure, Shared};
use super::ffi::{self, Config, RawCommunicator, Status, UniqueId};
use super::library::Library;
use ferrotune_kernels::cuda::{CudaDevice, Event, SideStream};
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at a communicator that nobody waits for, and at its errors in any case.
const WATCH: Duration = Duration::from_millis(100);
/// Between two looks at collectives that the rank waits for.
const WAITED_FOR: Duration = Duration::from_micros(50);
/// The same, when they take long.
const WAITED_LONG: Duration = Duration::from_micros(500);
/// When they do.
const LONG: Duration = Duration::from_millis(20);

/// What a collective does. Values are f32, and results lie where the inputs did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Sums over all ranks.
    AllReduce,
    /// Rank 0's values.
    Broadcast,
}

/// A collective to begin.
#[derive(Debug)]
pub(super) struct Collective {
    pub(super) operation: Operation,
    /// Of the first value, in device memory.
    pub(super) address: u64,
    pub(super) count: usize,
    /// Its number, from 0.
    pub(super) sequence: u64,
    /// Optimizer step it belongs to, from 0.
    pub(super) step: u64,
    /// The point after which its inputs are there.
    pub(super) inputs: Event,
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.operation {
            Operation::AllReduce => "all_reduce",
            Operation::Broadcast => "broadcast",
        };
        let (count, sequence, step) = (self.count, self.sequence, self.step);
        write!(
            f,
            "{name} of {count} values (number {sequence}, step {step})"
        )
    }
}

/// What the rank asks of the thread.
#[derive(Debug)]
pub(super) enum Command {
    /// Begin a collective.
    Begin(Collective),
    /// Answer once everything begun is done.
    Wait(Sender<()>),
    /// End the communicator and the thread.
    Finish,
}

/// What a thread begins with.
pub(super) struct Start {
    pub(super) library: Library,
    pub(super) device: Arc<CudaDevice>,
    pub(super) id: UniqueId,
    pub(super) shared: Arc<Shared>,
}

/// Life of the thread. `started` is answered, or dropped after a failure.
pub(super) fn run(start: Start, commands: &Receiver<Command>, started: Sender<()>) {
    let shared = Arc::clone(&start.shared);
    let stream = start.device.make_current();
    let stream = match stream.and_then(|()| start.device.side_stream()) {
        Ok(stream) => stream,
        Err(error) => return shared.fail(shared.failure("opening a stream for NCCL", error)),
    };
    let mut worker = Worker {
        library: start.library,
        communicator: std::ptr::null_mut(),
        stream,
        shared,
        begun: VecDeque::new(),
        waiter: None,
        looked: Instant::now(),
        joined: false,
    };
    let outcome = worker.join(start.id);
    let outcome = outcome.and_then(|()| {
        worker.joined = true;
        // A rank that has given up waiting has asked for an abort.
        let _ = started.send(());
        worker.serve(commands)
    });
    match outcome {
        Ok(()) => worker.finish(),
        Err(failure) => {
            worker.shared.fail(failure);
            drop(started);
            worker.waiter = None;
            worker.abort();
        }
    }
}

/// A collective that may still run.
struct Begun {
    collective: Collective,
    done: Event,
    /// Since when it could run.
    since: Option<Instant>,
}

struct Worker {
    library: Library,
    /// Null before it is made and after it is gone.
    communicator: RawCommunicator,
    stream: SideStream,
    shared: Arc<Shared>,
    /// Oldest first.
    begun: VecDeque<Begun>,
    /// Told when `begun` is empty, and since when it waits.
    waiter: Option<(Sender<()>, Instant)>,
    looked: Instant,
    /// Whether every rank was there once.
    joined: bool,
}

impl Worker {
    /// Makes the communicator.
    fn join(&mut self, id: UniqueId) -> Result<(), Failure> {
        let mut config = Config::non_blocking();
        let [ranks, rank] = [self.shared.world_size, self.shared.rank]
            .map(|number| c_int::try_from(number).unwrap_or(c_int::MAX));
        // SAFETY: both pointers are valid for the call; `config` has the size and the version it says; the
        // GPU is the current one of this thread.
        let status = unsafe {
            (self.library.api.init_rank)(&mut self.communicator, ranks, id, rank, &mut config)
        };
        let what = "ncclCommInitRankConfig";
        self.settle(status, self.shared.timeout, &what)
            .map_err(|mut failure| {
                failure.message += "; every rank has to reach this point: look for one that did not start, \
                                    and at NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO tells more";
                failure
            })
    }

    fn serve(&mut self, commands: &Receiver<Command>) -> Result<(), Failure> {
        loop {
            match commands.recv_timeout(self.pause()) {
                Ok(Command::Begin(collective)) => self.begin(collective)?,
                Ok(Command::Wait(waiter)) => {
                    let now = Instant::now();
                    self.waiter = Some((waiter, now));
                    for begun in &mut self.begun {
                        begun.since.get_or_insert(now);
                    }
                }
                Ok(Command::Finish) | Err(RecvTimeoutError::Disconnected) => {
                    return match self.begun.front() {
                        None => Ok(()),
                        Some(begun) => {
                            Err(self.shared.failure(&begun.collective, "left in progress"))
                        }
                    };
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.watch()?;
        }
    }

    fn pause(&self) -> Duration {
        match &self.waiter {
            None => WATCH,
            Some((_, since)) if since.elapsed() < LONG => WAITED_FOR,
            Some(_) => WAITED_LONG,
        }
    }

    fn begin(&mut self, collective: Collective) -> Result<(), Failure> {
        let broken = |error: ferrotune_kernels::Error| self.shared.failure(&collective, error);
        self.stream.wait(&collective.inputs).map_err(broken)?;
        let status = self.call(&collective);
        self.settle(status, self.shared.timeout, &collective)?;
        let done = self.stream.event().map_err(broken)?;
        self.begun.push_back(Begun {
            collective,
            done,
            since: None,
        });
        Ok(())
    }

    fn call(&self, collective: &Collective) -> Status {
        let &Collective { address, count, .. } = collective;
        let address = address as *mut c_void;
        let (api, stream) = (&self.library.api, self.stream.as_raw());
        // SAFETY: communicator and stream are open and used by this thread alone. The range lies in one
        // buffer of the GPU's memory; the host follows no such address, and the GPU checks what it is
        // given, so one that is gone, which takes a rank that dropped its buffer after an error, is a
        // fault of the GPU or a wrong sum in memory that nobody reads any more.
        unsafe {
            match collective.operation {
                Operation::AllReduce => (api.all_reduce)(
                    address,
                    address,
                    count,
                    ffi::FLOAT32,
                    ffi::SUM,
                    self.communicator,
                    stream,
                ),
                Operation::Broadcast => (api.broadcast)(
                    address,
                    address,
                    count,
                    ffi::FLOAT32,
                    0,
                    self.communicator,
                    stream,
                ),
            }
        }
    }

    /// Waits for the end of what a call has begun, which is when the next call may be made.
    fn settle(
        &self,
        mut status: Status,
        limit: Duration,
        what: &dyn fmt::Display,
    ) -> Result<(), Failure> {
        let begin = Instant::now();
        let mut pause = Duration::from_micros(10);
        loop {
            match status {
                ffi::SUCCESS => return Ok(()),
                ffi::IN_PROGRESS => {}
                failed => return Err(self.refused(failed, what)),
            }
            self.check_abort(what)?;
            if begin.elapsed() >= limit {
                return Err(self.too_long(what, limit));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
            status = self.state();
        }
    }

    /// What NCCL says of the communicator.
    fn state(&self) -> Status {
        let mut state = ffi::SUCCESS;
        // SAFETY: the communicator is open; the pointer is valid for one status.
        match unsafe { (self.library.api.async_error)(self.communicator, &mut state) } {
            ffi::SUCCESS => state,
            failed => failed,
        }
    }

    /// One look at everything that can go wrong, and at what is done.
    fn watch(&mut self) -> Result<(), Failure> {
        let broken = |what: &dyn fmt::Display, error| self.shared.failure(what, error);
        while let Some(oldest) = self.begun.front() {
            let done = oldest.done.is_done();
            if !done.map_err(|error| broken(&oldest.collective, error))? {
                break;
            }
            self.begun.pop_front();
        }
        if let Some(oldest) = self.begun.front_mut() {
            let collective = &oldest.collective;
            if oldest.since.is_none() {
                let there = collective.inputs.is_done();
                if there.map_err(|error| broken(collective, error))? {
                    oldest.since = Some(Instant::now());
                }
            }
            let limit = self.shared.timeout;
            if oldest.since.is_some_and(|since| since.elapsed() >= limit) {
                return Err(self.too_long(&self.begun[0].collective, limit));
            }
        } else if let Some((waiter, _)) = self.waiter.take() {
            // A rank that has given up waiting has asked for an abort.
            let _ = waiter.send(());
        }
        self.check_abort(&self.oldest())?;
        if self.looked.elapsed() >= WATCH {
            self.looked = Instant::now();
            match self.state() {
                ffi::SUCCESS | ffi::IN_PROGRESS => {}
                failed => return Err(self.refused(failed, &self.oldest())),
            }
        }
        Ok(())
    }

    /// What a failure is about that NCCL does not ascribe to a call.
    fn oldest(&self) -> String {
        match self.begun.front() {
            Some(begun) => begun.collective.to_string(),
            None => "between collectives".into(),
        }
    }

    fn check_abort(&self, what: &dyn fmt::Display) -> Result<(), Failure> {
        match self.shared.abort_reason() {
            None => Ok(()),
            Some(reason) => Err(self.shared.failure(what, format!("aborted: {reason}"))),
        }
    }

    fn refused(&self, status: Status, what: &dyn fmt::Display) -> Failure {
        let mut failure = self.shared.failure(what, self.library.describe(status));
        let wrong = matches!(status, ffi::INVALID_ARGUMENT | ffi::INVALID_USAGE);
        // Later it can be what a lost peer looks like.
        failure.permanent = wrong && !self.joined;
        failure
    }

    fn too_long(&self, what: &dyn fmt::Display, limit: Duration) -> Failure {
        let state = match self.state() {
            ffi::SUCCESS | ffi::IN_PROGRESS => "NCCL itself reports no error".into(),
            failed => self.library.describe(failed),
        };
        let seconds = limit.as_secs_f64();
        let why = format!("not done after {seconds} s, a peer may be stuck or gone ({state})");
        self.shared.failure(what, why)
    }

    /// Ends a communicator on which nothing is in progress.
    fn finish(mut self) {
        // SAFETY: the communicator is open and used by this thread alone.
        let status = unsafe { (self.library.api.finalize)(self.communicator) };
        let limit = self.shared.timeout.min(FINISH);
        if self.settle(status, limit, &"ncclCommFinalize").is_err() {
            return self.abort();
        }
        // SAFETY: as above; it is not used again.
        unsafe { (self.library.api.destroy)(self.communicator) };
        self.communicator = std::ptr::null_mut();
    }

    /// Ends what is in progress, and the communicator.
    fn abort(mut self) {
        if !self.communicator.is_null() {
            // SAFETY: the communicator is open and used by this thread alone, and not used again.
            unsafe { (self.library.api.abort)(self.communicator) };
            self.communicator = std::ptr::null_mut();
        }
    }
}
