//! Finding the store: resolve, connect, prove the token, again and again until the deadline.

use super::{listen, seconds, transient};
use crate::membership::{Membership, Timing};
use crate::store::store_subject;
use crate::wire::{Deadline, GreetError, JobToken, Patience, Refused, Subject, dial, greet};
use ferrotune_core::{Error, Result};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// For one address to accept a connection.
const DIAL: Duration = Duration::from_secs(3);
/// For whoever answers to prove that it is the store.
const GREET: Duration = Duration::from_secs(3);
/// The same where it is one of many ports.
const GREET_ONE_OF_MANY: Duration = Duration::from_secs(1);
/// For the resolver; its own patience can exceed any deadline.
const RESOLVE: Duration = Duration::from_secs(15);
const REPORT: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The search for the store, over all its attempts.
pub(super) struct Search {
    rank: usize,
    host: String,
    /// What is looked for, in words.
    place: String,
    ports: Vec<u16>,
    /// Where to look, instead of at `host`.
    fixed: Option<Vec<SocketAddr>>,
    subject: Subject,
    token: JobToken,
    refusals: Duration,
    begin: Instant,
    reported: Instant,
    refused_since: Option<Instant>,
    problem: String,
    pause: Duration,
}

/// What one attempt came to.
enum Attempt {
    Connected(TcpStream),
    /// Nobody there, or nobody of ours: in words.
    Not(String),
    /// A store of ours says no.
    Refused(Error),
}

impl Search {
    pub(super) fn new(membership: &Membership, timing: &Timing) -> Self {
        let master = &membership.master;
        let (ports, place) = if membership.master_port_is_taken {
            let place = format!("{master}, ports +1 to +{}", super::PORTS_ABOVE);
            (listen::ports_above(master.port).collect(), place)
        } else {
            (vec![master.port], master.to_string())
        };
        // Ranks of one machine meet on loopback, whatever its name resolves to.
        let one_machine = membership.nnodes <= 1 && membership.bind.is_none();
        let loopback = |&port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let fixed = one_machine.then(|| ports.iter().map(loopback).collect());
        let now = Instant::now();
        Self {
            rank: membership.rank,
            host: master.host.clone(),
            place,
            ports,
            fixed,
            subject: store_subject(&membership.job_id),
            token: membership.token.clone(),
            refusals: timing.refusals,
            begin: now,
            reported: now,
            refused_since: None,
            problem: "nothing tried yet".into(),
            pause: FIRST_PAUSE,
        }
    }

    /// Looks at these addresses only.
    pub(super) fn only(&mut self, addresses: Vec<SocketAddr>) {
        self.fixed = Some(addresses);
    }

    /// A connection to the store that has proved the token.
    ///
    /// # Errors
    /// [`Error::Transient`] at the deadline, [`Error::Config`] if it knows another token, or serves another
    /// job, for longer than leftovers of an earlier start would; [`Error::Stopped`] after a signal.
    pub(super) fn connect(&mut self, patience: &Patience<'_>) -> Result<TcpStream> {
        loop {
            match self.attempt(&patience.deadline) {
                Attempt::Connected(stream) => return Ok(stream),
                Attempt::Not(problem) => self.note(problem),
                Attempt::Refused(error) => self.refused(error)?,
            }
            self.pause(patience)?;
        }
    }

    /// Remembers what went wrong, and says so every half minute.
    pub(super) fn note(&mut self, problem: String) {
        self.problem = problem;
        if self.reported.elapsed() >= REPORT {
            self.reported = Instant::now();
            tracing::warn!(
                "rank {} has been looking for rank 0 at {} for {}: {}",
                self.rank,
                self.place,
                seconds(self.begin.elapsed()),
                self.problem
            );
        }
    }

    /// Goes on in spite of a refusal, for a while.
    ///
    /// # Errors
    /// `error`, once that while is over.
    pub(super) fn refused(&mut self, error: Error) -> Result<()> {
        let since = *self.refused_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= self.refusals {
            return Err(error);
        }
        self.note(error.to_string());
        Ok(())
    }

    /// Waits before the next attempt, longer each time.
    ///
    /// # Errors
    /// [`Error::Transient`] with what went wrong last, at the deadline; [`Error::Stopped`] after a signal.
    pub(super) fn pause(&mut self, patience: &Patience<'_>) -> Result<()> {
        let deadline = &patience.deadline;
        patience.check_stop()?;
        thread::sleep(self.pause.min(deadline.left()));
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        if deadline.has_passed() {
            let message = format!(
                "rank {} did not get into the store of rank 0 at {} within {}: {}",
                self.rank,
                self.place,
                seconds(self.begin.elapsed()),
                self.problem
            );
            return Err(transient(message));
        }
        Ok(())
    }

    fn attempt(&self, deadline: &Deadline) -> Attempt {
        let addresses = match &self.fixed {
            Some(addresses) => addresses.clone(),
            None => match self.resolve(deadline) {
                Ok(addresses) => addresses,
                Err(problem) => return Attempt::Not(problem),
            },
        };
        let mut outcome = Attempt::Not(format!("{} has no address", self.host));
        for address in addresses {
            match self.try_address(address, deadline) {
                Attempt::Connected(stream) => return Attempt::Connected(stream),
                // The word of a store of ours counts more than the silence of other ports.
                Attempt::Not(_) if matches!(outcome, Attempt::Refused(_)) => {}
                other => outcome = other,
            }
        }
        outcome
    }

    fn try_address(&self, address: SocketAddr, deadline: &Deadline) -> Attempt {
        let stream = match dial(address, deadline, DIAL) {
            Ok(stream) => stream,
            Err(e) => return Attempt::Not(cannot_connect(address, &e)),
        };
        let limit = if self.ports.len() > 1 {
            GREET_ONE_OF_MANY
        } else {
            GREET
        };
        let greeting = greet(&stream, &self.subject, &self.token, &deadline.within(limit));
        match greeting {
            Ok(()) => Attempt::Connected(stream),
            // One of many ports may be another job's.
            Err(GreetError::Refused(other)) if self.ports.len() > 1 => {
                let why = match other {
                    Refused::WrongToken => "has another token".to_owned(),
                    Refused::WrongJob(job) => format!("serves job {job:?}"),
                };
                Attempt::Not(format!("the store at {address} {why}, and is none of ours"))
            }
            Err(GreetError::Refused(Refused::WrongToken)) => Attempt::Refused(Error::config(
                "token",
                format!(
                    "the store at {address} has another token (wrong token): every rank of a job needs \
                     the same, and a store of another job may be listening there"
                ),
            )),
            Err(GreetError::Refused(Refused::WrongJob(job))) => Attempt::Refused(Error::config(
                "job_id",
                format!(
                    "the store at {address} serves job {job:?}, this rank belongs to {:?} (wrong job)",
                    self.subject.job
                ),
            )),
            Err(GreetError::Io(e)) if e.kind() == ErrorKind::TimedOut => Attempt::Not(format!(
                "{address} accepts connections but does not answer as a store of ferrotune"
            )),
            Err(GreetError::Io(e)) => Attempt::Not(format!(
                "{address} accepts connections but is no store of ferrotune, or went away: {e}"
            )),
        }
    }

    /// Looks the host up, within what is left of `deadline`.
    fn resolve(&self, deadline: &Deadline) -> Result<Vec<SocketAddr>, String> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(self.ports.iter().map(|&port| (ip, port).into()).collect());
        }
        let (done, answer) = mpsc::channel();
        let (host, port) = (self.host.clone(), self.ports.first().copied().unwrap_or(0));
        // It ends by itself, if late: the resolver's wait cannot be cut short.
        thread::Builder::new()
            .name("resolver".into())
            .spawn(move || {
                let found = (host.as_str(), port).to_socket_addrs();
                let _ = done.send(found.map(Iterator::collect::<Vec<_>>));
            })
            .map_err(|e| format!("cannot start a thread: {e}"))?;
        let found = match answer.recv_timeout(deadline.left().min(RESOLVE)) {
            Ok(Ok(found)) => found,
            Ok(Err(e)) => return Err(cannot_resolve(&self.host, &e.to_string())),
            Err(_) => return Err(format!("looking up {} takes too long (DNS)", self.host)),
        };
        let with_port = |port: u16| {
            found
                .iter()
                .map(move |address| SocketAddr::new(address.ip(), port))
        };
        Ok(self
            .ports
            .iter()
            .flat_map(|&port| with_port(port))
            .collect())
    }
}

fn cannot_connect(address: SocketAddr, error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => {
            format!("{address} refused the connection: nothing listens on that port yet")
        }
        ErrorKind::TimedOut | ErrorKind::WouldBlock => format!(
            "{address} did not answer (timeout): the host is down, or packets to it are dropped"
        ),
        _ => format!("cannot connect to {address}: {error}"),
    }
}

fn cannot_resolve(host: &str, error: &str) -> String {
    // What resolvers say for NXDOMAIN; glibc, musl and macOS.
    let unknown = [
        "Name or service not known",
        "Name does not resolve",
        "not known",
    ];
    if unknown.iter().any(|text| error.contains(text)) {
        format!("the name {host} does not exist (NXDOMAIN): its pod or service is not there yet")
    } else {
        format!("the name {host} cannot be looked up: {error}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::sync::atomic::AtomicBool;

    fn search(host: &str, port: u16) -> Search {
        let mut membership = Membership::on_one_machine(1, 2, port, JobToken::new("t"));
        membership.nnodes = 2;
        membership.master.host = host.into();
        Search::new(&membership, &Timing::default())
    }

    fn why_not(host: &str, port: u16) -> String {
        let patience = Patience {
            deadline: Deadline::after(Duration::from_millis(400)),
            stop: &AtomicBool::new(false),
        };
        let begin = Instant::now();
        let error = search(host, port)
            .connect(&patience)
            .expect_err("nobody there");
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "held to its deadline"
        );
        assert!(matches!(error, Error::Transient { .. }));
        error.to_string()
    }

    #[test]
    fn what_keeps_a_rank_from_the_store_has_a_name_each() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let silent = why_not("127.0.0.1", port);
        assert!(silent.contains("does not answer as a store"), "{silent}");
        drop(listener);
        let refused = why_not("127.0.0.1", port);
        assert!(refused.contains("refused"), "{refused}");
        assert!(
            refused.contains("rank 1") && refused.contains("within 0."),
            "{refused}"
        );
    }

    #[test]
    fn a_name_that_does_not_exist_is_told_from_a_resolver_that_fails() {
        let gone = cannot_resolve("pod-0", "failed to lookup: Name or service not known");
        assert!(gone.contains("NXDOMAIN") && gone.contains("pod-0"));
        let down = cannot_resolve("pod-0", "Temporary failure in name resolution");
        assert!(!down.contains("NXDOMAIN") && down.contains("Temporary"));
    }
}
