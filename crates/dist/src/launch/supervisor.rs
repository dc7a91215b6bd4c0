//! The launcher's loop: signals in, ends of ranks in, signals out.

use super::ranks::{Rank, Ranks};
use super::verdict::{End, How, Kind, verdict};
use super::{LaunchError, STOP_GRACE, output};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, wait, waitpid};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Ends of ranks are looked for at least so often, should a SIGCHLD get lost.
const POLL: Duration = Duration::from_millis(100);
/// A rank that lost its peer ends before that peer does, sometimes: time for the cause to show.
const SETTLE: Duration = Duration::from_millis(200);
/// For what ranks have written to come out.
const DRAIN: Duration = Duration::from_secs(1);

/// The signals of this process, as a queue.
pub(super) struct Signals {
    queue: Receiver<i32>,
    handle: signal_hook::iterator::Handle,
}

impl Signals {
    /// Catches them from now on: before there is a rank, and before PID 1 would ignore them.
    pub(super) fn listen() -> Result<Self, LaunchError> {
        let caught = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGCHLD];
        let mut signals = signal_hook::iterator::Signals::new(caught)
            .map_err(LaunchError::of("signal handlers"))?;
        let handle = signals.handle();
        let (sender, queue) = channel();
        std::thread::spawn(move || {
            for signal in signals.forever() {
                if sender.send(signal).is_err() {
                    return;
                }
            }
        });
        Ok(Self { queue, handle })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.handle.close();
    }
}

/// When ranks that are left will be told to end, and when they will be killed.
#[derive(Clone, Copy, Debug)]
struct Ending {
    term_at: Option<Instant>,
    kill_at: Option<Instant>,
}

struct Watch {
    alive: Vec<Rank>,
    ends: Vec<End>,
    forwarded: Option<i32>,
    ending: Option<Ending>,
    /// The ranks that are left got a signal because of another one.
    told: bool,
    grace: Duration,
}

/// Watches until no rank is left; the exit code of the whole.
pub(super) fn watch(mut ranks: Ranks, signals: &Signals, grace: Duration) -> u8 {
    let mut watch = Watch {
        alive: std::mem::take(&mut ranks.alive),
        ends: Vec::new(),
        forwarded: None,
        ending: None,
        told: false,
        grace,
    };
    let init = std::process::id() == 1;
    while !watch.alive.is_empty() {
        if let Ok(signal) = signals.queue.recv_timeout(watch.patience())
            && signal != SIGCHLD
        {
            watch.forward(signal);
        }
        watch.reap();
        if init {
            watch.reap_orphans();
        }
        watch.end_others();
    }
    ranks.output.drain(DRAIN);
    verdict(&watch.ends, watch.forwarded)
}

impl Watch {
    /// Until the next thing to do.
    fn patience(&self) -> Duration {
        let ending = self.ending.iter();
        let next = ending.flat_map(|e| [e.term_at, e.kill_at]).flatten().min();
        next.map_or(POLL, |at| {
            at.saturating_duration_since(Instant::now()).min(POLL)
        })
    }

    fn forward(&mut self, signal: i32) {
        let name = signal_hook::low_level::signal_name(signal).unwrap_or("signal");
        output::say(&format!("{name}: passed on to {} ranks", self.alive.len()));
        self.forwarded = Some(signal);
        if let Some(signal) = Signal::from_named_raw(signal) {
            self.signal_all(signal);
        }
    }

    fn signal_all(&self, signal: Signal) {
        for rank in &self.alive {
            // One that has just ended is as good as told.
            let _ = kill_process_group(rank.pid, signal);
        }
    }

    fn reap(&mut self) {
        let pids: Vec<Pid> = self.alive.iter().map(|rank| rank.pid).collect();
        for pid in pids {
            match waitpid(Some(pid), WaitOptions::NOHANG) {
                Ok(Some((_, status))) => self.ended(pid, status),
                // Somebody else took its status: that it ended is all there is to know.
                Err(Errno::CHILD) => self.lost(pid),
                Ok(None) | Err(_) => {}
            }
        }
    }

    /// PID 1 is the parent of every process that lost its own.
    fn reap_orphans(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            self.ended(pid, status);
        }
    }

    fn lost(&mut self, pid: Pid) {
        self.record(pid, How::Code(ferrotune_core::ExitCode::Internal as u8));
    }

    fn ended(&mut self, pid: Pid, status: WaitStatus) {
        let code = status
            .exit_status()
            .and_then(|code| u8::try_from(code).ok());
        let how = match (code, status.terminating_signal()) {
            (Some(code), _) => How::Code(code),
            (None, Some(signal)) => How::Signal(signal),
            // Stopped or continued: not ended.
            (None, None) => return,
        };
        self.record(pid, how);
    }

    fn record(&mut self, pid: Pid, how: How) {
        let Some(at) = self.alive.iter().position(|rank| rank.pid == pid) else {
            return;
        };
        let rank = self.alive.remove(at).rank;
        // What it left behind in its group has no parent to end it.
        let _ = kill_process_group(pid, Signal::KILL);
        let told = self.told;
        let end = End { rank, how, told };
        self.ends.push(end);
        let kind = end.kind(self.forwarded);
        if kind == Kind::Failed && !told {
            output::say(&end.describe());
        }
        if kind != Kind::Done {
            self.begin_ending(kind, how);
        }
    }

    /// A rank that is gone leaves the others nothing to do.
    fn begin_ending(&mut self, kind: Kind, how: How) {
        let now = Instant::now();
        let lost_peer = how == How::Code(ferrotune_core::ExitCode::Transient as u8);
        let settle = match kind {
            // The others stop by themselves, and a SIGTERM beside the one that some may have got already would
            // tell them not to save.
            Kind::Stopped => STOP_GRACE,
            _ if lost_peer => SETTLE,
            _ => Duration::ZERO,
        };
        let kill_at = now + settle + self.grace;
        match &mut self.ending {
            Some(ending) => ending.kill_at = ending.kill_at.map(|at| at.min(kill_at)),
            None => {
                self.ending = Some(Ending {
                    term_at: Some(now + settle),
                    kill_at: Some(kill_at),
                });
            }
        }
    }

    fn end_others(&mut self) {
        let Some(mut ending) = self.ending else {
            return;
        };
        let now = Instant::now();
        if ending.term_at.is_some_and(|at| at <= now) {
            ending.term_at = None;
            // To a rank a second SIGTERM means: leave at once, without a checkpoint.
            if self.forwarded.is_none() && !self.alive.is_empty() {
                output::say(&format!("ending {} other ranks", self.alive.len()));
                self.signal_all(Signal::TERM);
                self.told = true;
            }
        }
        if ending.kill_at.is_some_and(|at| at <= now) {
            ending.kill_at = None;
            for rank in &self.alive {
                output::say(&format!("rank {} does not end; killing it", rank.rank));
            }
            self.signal_all(Signal::KILL);
            self.told = true;
        }
        self.ending = Some(ending);
    }
}
