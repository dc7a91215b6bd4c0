//! How ranks find each other: rank 0 listens, everyone (rank 0 too) connects, announces itself, and gets
//! the table of all.
//!
//! Everything before the table is one loop against one deadline: names are looked up anew each time, since
//! a pod's name may not resolve yet, or still lead to its predecessor.

mod listen;
mod reach;

use crate::membership::{Membership, Timing, Work};
use crate::store::{Announcement, Control, JoinError, Refusal, RefusalKind, Server};
use crate::wire::{Deadline, JobToken, Patience, nonce};
use ferrotune_core::{Error, Result};
use reach::Search;
use std::net::{IpAddr, TcpListener};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Room for the sixteen ports above a master's port that is taken.
const PORTS_ABOVE: u16 = 16;

/// What a rendezvous gives: the control plane, and a listener whose address every rank has been told.
pub(crate) struct Met {
    pub(crate) control: Control,
    pub(crate) data: TcpListener,
    pub(crate) token: JobToken,
}

/// Meets the other ranks. On rank 0, `listeners` serve the store; without any, it listens where
/// `membership` says.
///
/// # Errors
/// [`Error::Config`] if ranks do not fit together, [`Error::Transient`] if they do not all come in time,
/// [`Error::Stopped`] once `stop` is set.
pub(crate) fn meet(
    membership: &Membership,
    work: &Work,
    timing: &Timing,
    listeners: Vec<TcpListener>,
    stop: &AtomicBool,
) -> Result<Met> {
    let patience = Patience {
        deadline: Deadline::after(timing.rendezvous),
        stop,
    };
    let mut server = None;
    let mut search = Search::new(membership, timing);
    if membership.rank == 0 {
        let listeners = match listeners.is_empty() {
            true => listen::listeners(membership)?,
            false => listeners,
        };
        let failed = |e: std::io::Error| transient(format!("cannot serve the store: {e}"));
        let address = listeners
            .first()
            .map(TcpListener::local_addr)
            .transpose()
            .map_err(failed)?;
        let meeting: String = nonce()
            .map_err(failed)?
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        // Where rank 0 takes data connections is not known yet, and not compared.
        let host = announcement(membership, work, ([0, 0, 0, 0], 0).into());
        let token = membership.token.clone();
        server = Some(Server::open(listeners, host, meeting, token, timing).map_err(failed)?);
        search.only(address.into_iter().collect());
    }
    loop {
        let stream = search.connect(&patience)?;
        let local = stream
            .local_addr()
            .map_err(|e| transient(format!("cannot tell this rank's own address: {e}")))?;
        let ip = data_ip(membership, local.ip());
        let data = TcpListener::bind((ip, 0))
            .map_err(|e| transient(format!("cannot listen on {ip} for data: {e}")))?;
        let data_address = data
            .local_addr()
            .map_err(|e| transient(format!("cannot tell the port of a listener: {e}")))?;
        let announcement = announcement(membership, work, data_address);
        match Control::join(stream, &announcement, &mut server, timing, &patience) {
            Ok(control) => {
                return Ok(Met {
                    control,
                    data,
                    token: membership.token.clone(),
                });
            }
            Err(JoinError::Failed(error)) => return Err(error),
            Err(JoinError::Lost(why)) => search.note(format!("the store went away: {why}")),
            // An older store makes room, or runs on until the deadline of this rank.
            Err(JoinError::Refused(Refusal {
                kind: RefusalKind::Ahead,
                message,
            })) => {
                search.note(message);
            }
            Err(JoinError::Refused(refusal)) => search.refused(refused(refusal)?)?,
        }
        search.pause(&patience)?;
    }
}

/// A refusal as an error: lasting ones at once, the others to be tried again for a while.
fn refused(refusal: Refusal) -> Result<Error> {
    let Refusal { kind, message } = refusal;
    let message = format!("the store refuses this rank: {message}");
    match kind {
        RefusalKind::Mismatch(key) => Err(Error::config(key, message)),
        RefusalKind::Stale => Err(transient(message)),
        RefusalKind::Duplicate => Ok(Error::config("rank", message)),
        RefusalKind::Ahead => Ok(transient(message)),
    }
}

fn announcement(membership: &Membership, work: &Work, data: std::net::SocketAddr) -> Announcement {
    Announcement {
        launcher: membership.launcher.clone(),
        job_id: membership.job_id.clone(),
        restart_attempt: membership.restart_attempt,
        nnodes: membership.nnodes,
        node_rank: membership.node_rank,
        local_rank: membership.local_rank,
        local_world_size: membership.local_world_size,
        rank: membership.rank,
        world_size: membership.world_size,
        device: work.device.clone(),
        config_digest: work.config_digest.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        host: host_name(),
        pid: std::process::id(),
        data,
    }
}

/// Where other ranks can reach this one: the address that leads to the store, unless that is a loopback
/// address which means nothing on other nodes.
fn data_ip(membership: &Membership, towards_store: IpAddr) -> IpAddr {
    if let Some(ip) = membership.bind.filter(|ip| !ip.is_unspecified()) {
        return ip;
    }
    match listen::routed_ip() {
        Some(ip) if membership.nnodes > 1 && towards_store.is_loopback() => ip,
        _ => towards_store,
    }
}

fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

fn transient(message: String) -> Error {
    Error::Transient { message }
}

/// `600 s`, or `1.5 s` below ten.
fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(10) {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} s", time.as_secs())
    }
}
