//! One end of a control connection: a thread that writes, and reading with an eye on silence.
//!
//! Whoever posts a message does not wait for the peer. The writer sends what is posted, and a sign of life
//! whenever nothing was posted for a while.

use crate::wire::{Deadline, MAX_MEMBER_FRAME, frame, read_frame};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Messages that may wait for a slow peer. One that lets more pile up is as good as dead.
const QUEUE: usize = 256;
const STACK: usize = 256 << 10;

/// The writing end.
#[derive(Debug)]
pub(super) struct Outbox {
    queue: Option<SyncSender<Vec<u8>>>,
    stream: Arc<TcpStream>,
    writer: Option<JoinHandle<()>>,
}

impl Outbox {
    /// Starts the writer. `pulse` makes a sign of life, every `interval`.
    pub(super) fn start<M: Serialize>(
        stream: &Arc<TcpStream>,
        interval: Duration,
        pulse: impl Fn() -> M + Send + 'static,
    ) -> io::Result<Self> {
        let (queue, posted) = sync_channel(QUEUE);
        let for_writer = Arc::clone(stream);
        let writer = thread::Builder::new()
            .name("control-writer".into())
            .stack_size(STACK)
            .spawn(move || {
                let written = write_all(&for_writer, &posted, interval, &pulse);
                // The reader of this end sees the connection end; the peer reads what was sent before.
                let end = if written.is_ok() {
                    Shutdown::Write
                } else {
                    Shutdown::Both
                };
                let _ = for_writer.shutdown(end);
            })?;
        Ok(Self {
            queue: Some(queue),
            stream: Arc::clone(stream),
            writer: Some(writer),
        })
    }

    /// Queues `message`; a peer with a full queue loses its connection.
    pub(super) fn post<M: Serialize>(&self, message: &M) {
        let Some(queue) = &self.queue else { return };
        let sent = frame(message).is_ok_and(|frame| queue.try_send(frame).is_ok());
        if !sent {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    /// Sends what was posted, then closes this direction. Does not wait.
    pub(super) fn close(&mut self) {
        self.queue = None;
    }

    /// Closes, and waits until everything is sent (or the peer is found dead).
    pub(super) fn flush(&mut self) {
        self.close();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }

    /// Ends the connection both ways, at once.
    pub(super) fn cut(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn write_all<M: Serialize>(
    mut stream: &TcpStream,
    posted: &Receiver<Vec<u8>>,
    interval: Duration,
    pulse: &impl Fn() -> M,
) -> io::Result<()> {
    loop {
        let frame = match posted.recv_timeout(interval) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) => frame(&pulse())?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        stream.write_all(&frame)?;
    }
}

/// The next message, or what it means that there is none, in words that fit after a name.
pub(super) fn next<M: DeserializeOwned>(
    stream: &TcpStream,
    silence: Duration,
) -> Result<M, String> {
    read_frame(stream, MAX_MEMBER_FRAME, &Deadline::after(silence)).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            "its connection was closed".to_owned()
        }
        ErrorKind::TimedOut => format!("no sign of life for {:.1} s", silence.as_secs_f64()),
        _ => format!("its connection failed: {e}"),
    })
}
