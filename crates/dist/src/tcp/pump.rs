//! Moves bytes between this rank and its peers, both ways at once, on one thread.

use super::mesh::Mesh;
use crate::wire::Deadline;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Bytes of one write or read: small enough to stay in cache between the kernel and a sum.
const CHUNK: usize = 256 << 10;
/// How long to sleep at most before looking whether the group has failed elsewhere.
const NAP: Duration = Duration::from_millis(500);

/// An exchange, as the bytes that may move now.
pub(super) trait Exchange {
    /// What can be sent to `peer` now.
    fn outgoing(&self, peer: usize) -> &[u8];

    /// `bytes` of [`Exchange::outgoing`] are sent.
    fn sent(&mut self, peer: usize, bytes: usize);

    /// Where the next bytes of `peer` go; empty if none are expected now.
    fn incoming(&mut self, peer: usize) -> &mut [u8];

    /// `bytes` of [`Exchange::incoming`] are filled.
    ///
    /// # Errors
    /// [`Fault::Diverged`] if they show that the peer does something else.
    fn received(&mut self, peer: usize, bytes: usize) -> Result<(), Fault>;

    /// Whether everything is sent and received.
    fn is_done(&self) -> bool;
}

/// Why an exchange failed, as this rank sees it.
#[derive(Debug)]
pub(super) enum Fault {
    /// The connection to this peer ended.
    Lost { peer: usize, why: String },
    /// This peer did not send, or take, its bytes in time.
    Late { peer: usize },
    /// This peer asks for something else.
    Diverged { peer: usize, theirs: String },
    /// The group failed elsewhere, or was aborted.
    Aborted,
    /// Not the network's fault.
    Local(String),
}

/// Runs `exchange` to its end. `failed` says whether the group has failed meanwhile.
pub(super) fn run(
    mesh: &Mesh,
    exchange: &mut impl Exchange,
    deadline: &Deadline,
    failed: &impl Fn() -> bool,
) -> Result<(), Fault> {
    loop {
        let mut moved = false;
        for (peer, stream) in mesh.peers() {
            moved |= send_some(stream, peer, exchange)?;
            moved |= receive_some(stream, peer, exchange)?;
        }
        if exchange.is_done() {
            return Ok(());
        }
        if !moved {
            if failed() {
                return Err(Fault::Aborted);
            }
            wait(mesh, exchange, deadline)?;
        }
    }
}

fn send_some(
    mut stream: &TcpStream,
    peer: usize,
    exchange: &mut impl Exchange,
) -> Result<bool, Fault> {
    let bytes = exchange.outgoing(peer);
    if bytes.is_empty() {
        return Ok(false);
    }
    match stream.write(&bytes[..bytes.len().min(CHUNK)]) {
        Ok(sent) => {
            exchange.sent(peer, sent);
            Ok(sent > 0)
        }
        Err(e) if is_later(&e) => Ok(false),
        Err(e) => Err(lost(peer, &e)),
    }
}

fn receive_some(
    mut stream: &TcpStream,
    peer: usize,
    exchange: &mut impl Exchange,
) -> Result<bool, Fault> {
    let space = exchange.incoming(peer);
    if space.is_empty() {
        return Ok(false);
    }
    let limit = space.len().min(CHUNK);
    match stream.read(&mut space[..limit]) {
        Ok(0) => Err(lost(peer, &ErrorKind::UnexpectedEof.into())),
        Ok(received) => {
            exchange.received(peer, received)?;
            Ok(true)
        }
        Err(e) if is_later(&e) => Ok(false),
        Err(e) => Err(lost(peer, &e)),
    }
}

/// Sleeps until a socket is ready for what the exchange waits for.
fn wait(mesh: &Mesh, exchange: &mut impl Exchange, deadline: &Deadline) -> Result<(), Fault> {
    let mut sockets = Vec::with_capacity(mesh.world_size());
    let mut waits_for = None;
    for (peer, stream) in mesh.peers() {
        let mut flags = PollFlags::empty();
        if !exchange.outgoing(peer).is_empty() {
            flags |= PollFlags::OUT;
            waits_for.get_or_insert(peer);
        }
        if !exchange.incoming(peer).is_empty() {
            // Whom bytes are missing from says more than whom they cannot be sent to.
            if flags.is_empty() || waits_for.is_none() {
                waits_for = Some(peer);
            }
            flags |= PollFlags::IN;
        }
        if !flags.is_empty() {
            sockets.push(PollFd::new(stream, flags));
        }
    }
    let Some(peer) = waits_for else {
        return Err(Fault::Local("an exchange that waits for nobody".into()));
    };
    if deadline.has_passed() {
        return Err(Fault::Late { peer });
    }
    let nap = deadline.left().min(NAP);
    let nap = Timespec {
        tv_sec: 0,
        tv_nsec: nap.subsec_nanos().max(1_000_000).into(),
    };
    match poll(&mut sockets, Some(&nap)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(Fault::Local(format!("cannot wait for sockets: {e}"))),
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn lost(peer: usize, error: &io::Error) -> Fault {
    let why = match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            "closed its connection".to_owned()
        }
        _ => format!("cannot be reached any more: {error}"),
    };
    Fault::Lost { peer, why }
}
