//! The process group: values go through MPI, everything else through the host group.

use super::MpiOptions;
use super::worker::{self, Request};
use crate::agreement::Header;
use crate::tcp::AbortHandle;
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, Result};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Elements that go to MPI at a time: what the rank and the thread hold beside the buffer.
const PIECE: usize = 4 << 20;
/// Between two looks at whether a peer is lost.
const LOOK: Duration = Duration::from_millis(20);
/// Longest wait for MPI to be finalized, which all ranks have to come to.
const FINISH: Duration = Duration::from_secs(5);

/// One rank of a group that sums through MPI.
///
/// Sums have the same bits on every rank only if the site's MPI gives them; `replica_check_steps` tells.
#[derive(Debug)]
pub struct Mpi {
    host: Box<dyn ProcessGroup>,
    options: MpiOptions,
    requests: Option<Sender<Request>>,
    answers: Receiver<Result<Vec<f32>, String>>,
    thread: Option<JoinHandle<()>>,
    calls: u64,
    step: u64,
    failure: Option<String>,
}

impl Mpi {
    /// Joins all ranks of `host`.
    ///
    /// # Errors
    /// [`Error::Config`] if mpirun started other ranks, [`Error::Transient`] if one does not arrive.
    pub fn new(host: Box<dyn ProcessGroup>, options: MpiOptions) -> Result<Self> {
        let (requests, inbox) = mpsc::channel();
        let (outbox, answers) = mpsc::channel();
        let place = (host.rank(), host.world_size());
        let thread = thread::Builder::new()
            .name("mpi".into())
            .spawn(move || worker::run(place, &inbox, &outbox))
            .map_err(|e| Error::Transient {
                message: format!("cannot start a thread for MPI: {e}"),
            })?;
        let mut group = Self {
            host,
            options,
            requests: Some(requests),
            answers,
            thread: Some(thread),
            calls: 0,
            step: 0,
            failure: None,
        };
        group.answer("MPI_Init")?;
        Ok(group)
    }

    /// The thread's answer, unless a peer is lost or time runs out first.
    fn answer(&mut self, what: &str) -> Result<Vec<f32>> {
        let begin = Instant::now();
        loop {
            match self.answers.recv_timeout(LOOK) {
                Ok(Ok(values)) => return Ok(values),
                Ok(Err(why)) => return Err(Error::config("ddp_backend", why)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.fail(format!("{what}: the thread that calls MPI has ended")));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(why) = self.options.peers.as_ref().and_then(AbortHandle::failure) {
                return Err(self.fail(why));
            }
            if begin.elapsed() >= self.options.timeout {
                let seconds = self.options.timeout.as_secs_f64();
                return Err(self.fail(format!("{what}: not done by MPI after {seconds} s")));
            }
        }
    }

    /// Every later call fails with the same words.
    fn fail(&mut self, why: String) -> Error {
        let message = self.failure.get_or_insert(why).clone();
        Error::Transient { message }
    }

    /// Agrees with the other ranks on `what`, and gives `buffer` to MPI piece by piece.
    fn exchange(
        &mut self,
        what: &str,
        request: fn(Vec<f32>) -> Request,
        buffer: &mut FlatBuffer,
        totals: &mut [f64],
    ) -> Result<()> {
        if let Some(message) = self.failure.clone() {
            return Err(Error::Transient { message });
        }
        let values = buffer.as_mut_slice();
        let header = Header {
            what: what.into(),
            call: self.calls,
            step: self.step,
            len: values.len() as u64,
            bucket: PIECE as u64,
        };
        self.calls += 1;
        header.exchange(self.host.as_mut(), totals)?;
        for piece in values.chunks_mut(PIECE) {
            let sent = self
                .requests
                .as_ref()
                .map(|r| r.send(request(piece.to_vec())));
            if !matches!(sent, Some(Ok(()))) {
                return Err(self.fail(format!("{what}: the thread that calls MPI has ended")));
            }
            piece.copy_from_slice(&self.answer(what)?);
        }
        Ok(())
    }
}

impl ProcessGroup for Mpi {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn begin_step(&mut self, step: u64, stop: bool) -> Result<bool> {
        self.step = step;
        self.host.begin_step(step, stop)
    }

    fn all_reduce(&mut self, buffer: &mut FlatBuffer, totals: &mut [f64]) -> Result<()> {
        self.exchange("all_reduce", Request::Sum, buffer, totals)
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.host.all_gather(bytes)
    }

    fn broadcast(&mut self, buffer: &mut FlatBuffer) -> Result<()> {
        self.exchange("broadcast", Request::Broadcast, buffer, &mut [])
    }
}

impl Drop for Mpi {
    /// Finalizes MPI if nothing is in progress and all ranks do; else the thread is left to its wait.
    fn drop(&mut self) {
        drop(self.requests.take());
        let patience = if self.failure.is_none() {
            FINISH
        } else {
            Duration::ZERO
        };
        let deadline = Instant::now() + patience;
        let Some(thread) = self.thread.take() else {
            return;
        };
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
