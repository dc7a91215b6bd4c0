//! What ranks write: whole lines, each behind its rank.

use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// A longer line comes out in parts.
const LONGEST_LINE: u64 = 1 << 16;

/// Threads that pass lines on to standard error.
#[derive(Debug)]
pub(super) struct Prefixed {
    ended: Receiver<()>,
    running: Option<Sender<()>>,
}

impl Default for Prefixed {
    fn default() -> Self {
        let (running, ended) = channel();
        Self {
            ended,
            running: Some(running),
        }
    }
}

impl Prefixed {
    /// Passes on what comes through `pipe`, until nobody can write to it any more.
    pub(super) fn pass_on(&mut self, rank: usize, pipe: PipeReader) {
        let running = self.running.clone();
        std::thread::spawn(move || {
            copy_lines(rank, BufReader::new(pipe), |line| {
                // One write per line keeps those of several ranks apart; nobody may be reading.
                let _ = std::io::stderr().write_all(line);
            });
            drop(running);
        });
    }

    /// Waits until everything is out, at most so long: a program that a rank left behind may hold
    /// its pipe open.
    pub(super) fn drain(&mut self, at_most: Duration) {
        self.running = None;
        let outcome = self.ended.recv_timeout(at_most);
        debug_assert!(matches!(
            outcome,
            Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout)
        ));
    }
}

pub(super) fn copy_lines(rank: usize, mut from: impl BufRead, mut write: impl FnMut(&[u8])) {
    let prefix = format!("[rank {rank}] ").into_bytes();
    loop {
        let mut line = prefix.clone();
        let limited = from.by_ref().take(LONGEST_LINE);
        let read = { limited }.read_until(b'\n', &mut line);
        if !matches!(read, Ok(count) if count > 0) {
            return;
        }
        if !line.ends_with(b"\n") {
            line.push(b'\n');
        }
        write(&line);
    }
}

/// A line of the launcher itself.
pub(super) fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("launch: {line}\n").as_bytes());
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
