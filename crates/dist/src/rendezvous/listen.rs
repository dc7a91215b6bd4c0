//! Where rank 0 listens, and who sits on a port that is taken.

use super::PORTS_ABOVE;
use crate::membership::Membership;
use ferrotune_core::{Error, Result};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, TcpListener, ToSocketAddrs, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

/// How long a predecessor may take to free a fixed port.
const PORT_PATIENCE: Duration = Duration::from_secs(3);

/// Listeners for the store, all on one port.
///
/// # Errors
/// [`Error::Transient`] if the port, or each of the sixteen above it, is taken.
pub(super) fn listeners(membership: &Membership) -> Result<Vec<TcpListener>> {
    let ips = addresses(membership);
    let master = &membership.master;
    if !membership.master_port_is_taken {
        return fixed(&ips, master.port);
    }
    let mut last = None;
    for port in ports_above(master.port) {
        match bind_all(&ips, port) {
            Ok(listeners) => return Ok(listeners),
            Err(e) => last = Some(e),
        }
    }
    let message = format!(
        "rank 0 finds no free port for its store: port {} is the launcher's, and {} to {} cannot be bound \
         on {ips:?} (the last: {})",
        master.port,
        master.port.saturating_add(1),
        master.port.saturating_add(PORTS_ABOVE),
        last.map_or_else(|| "none exists".into(), |e| e.to_string()),
    );
    Err(Error::Transient { message })
}

/// The ports to try where the launcher has the master's own.
pub(super) fn ports_above(port: u16) -> impl Iterator<Item = u16> {
    (1..=PORTS_ABOVE).filter_map(move |above| port.checked_add(above))
}

fn fixed(ips: &[IpAddr], port: u16) -> Result<Vec<TcpListener>> {
    let begin = Instant::now();
    loop {
        match bind_all(ips, port) {
            Ok(listeners) => return Ok(listeners),
            Err(e) if e.kind() == ErrorKind::AddrInUse && begin.elapsed() < PORT_PATIENCE => {
                thread::sleep(Duration::from_millis(100));
            }
            Err(e) => {
                let owner = match e.kind() {
                    ErrorKind::AddrInUse => format!(
                        ", held by {}. Give each job on this host a master port of its own",
                        owner(port).unwrap_or_else(|| format!(
                            "a process this one cannot see (`ss -ltnp sport = :{port}` as root shows it)"
                        ))
                    ),
                    _ => String::new(),
                };
                let message = format!("rank 0 cannot listen on port {port} of {ips:?}: {e}{owner}");
                return Err(Error::Transient { message });
            }
        }
    }
}

/// Listens on all of `ips` that are this host's.
fn bind_all(ips: &[IpAddr], port: u16) -> io::Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    let mut problem = io::Error::from(ErrorKind::AddrNotAvailable);
    for &ip in ips {
        match TcpListener::bind((ip, port)) {
            Ok(listener) => listeners.push(listener),
            // The address of a service in front of this pod, say.
            Err(e) if e.kind() == ErrorKind::AddrNotAvailable => problem = e,
            Err(e) => return Err(e),
        }
    }
    match listeners.is_empty() {
        true => Err(problem),
        false => Ok(listeners),
    }
}

/// The addresses by which other ranks look for this one.
fn addresses(membership: &Membership) -> Vec<IpAddr> {
    if let Some(ip) = membership.bind {
        return vec![ip];
    }
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    if membership.nnodes <= 1 {
        return vec![loopback];
    }
    // Rank 0 does not depend on its own name: it may not resolve before the pod is ready, or resolve to
    // loopback in the pod's own hosts file.
    let named = (membership.master.host.as_str(), membership.master.port).to_socket_addrs();
    let mut ips: Vec<IpAddr> = named.into_iter().flatten().map(|a| a.ip()).collect();
    ips.extend(routed_ip());
    ips.push(loopback);
    let mut seen = Vec::new();
    ips.retain(|ip| {
        let new = !seen.contains(ip);
        seen.push(*ip);
        new && !ip.is_unspecified()
    });
    ips
}

/// The address of the interface that leads out of this host. Sends nothing.
pub(super) fn routed_ip() -> Option<IpAddr> {
    // Addresses kept for documentation: the route to them is the default route.
    [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")]
        .into_iter()
        .find_map(|(from, to)| {
            let socket = UdpSocket::bind(from).ok()?;
            socket.connect(to).ok()?;
            let ip = socket.local_addr().ok()?.ip();
            (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
        })
}

/// The process that listens on `port` of this host, as far as this one may see.
fn owner(port: u16) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .find_map(|table| listening_inode(&table, port))?;
    let link = format!("socket:[{inode}]");
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name();
        if pid.to_str().is_none_or(|name| name.parse::<u32>().is_err()) {
            continue;
        }
        let Ok(open) = std::fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let holds = open
            .flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .any(|target| target.as_os_str() == link.as_str());
        if holds {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {} ({})", pid.display(), name.trim()));
        }
    }
    None
}

/// The inode of the socket that listens on `port`, in a table of `/proc/net`.
fn listening_inode(table: &str, port: u16) -> Option<u64> {
    const LISTEN: &str = "0A";
    let wanted = format!(":{port:04X}");
    table.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let listens = words.get(1)?.ends_with(&wanted) && *words.get(3)? == LISTEN;
        if listens {
            words.get(9)?.parse().ok()
        } else {
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::JobToken;

    #[test]
    fn a_fixed_port_that_is_taken_is_an_error_that_names_who_has_it() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = taken.local_addr().expect("bound").port();
        let membership = Membership::on_one_machine(0, 2, port, JobToken::new("t"));
        let begin = Instant::now();
        let error = listeners(&membership).expect_err("taken");
        assert!(begin.elapsed() < PORT_PATIENCE + Duration::from_secs(2));
        let message = error.to_string();
        let me = format!("process {}", std::process::id());
        assert!(
            message.contains(&me) && message.contains(&port.to_string()),
            "{message}"
        );
        assert!(matches!(error, Error::Transient { .. }));
    }

    #[test]
    fn beside_a_launchers_store_a_port_above_it_is_found() {
        // Two neighbours: the first is "the launcher's", the second stands in the way.
        let (launcher, next) = (0..200)
            .find_map(|_| {
                let first = TcpListener::bind("127.0.0.1:0").ok()?;
                let port = first.local_addr().ok()?.port();
                let second = TcpListener::bind(("127.0.0.1", port.checked_add(1)?)).ok()?;
                Some((first, second))
            })
            .expect("two free ports side by side");
        let port = launcher.local_addr().expect("bound").port();
        let mut membership = Membership::on_one_machine(0, 2, port, JobToken::new("t"));
        membership.master_port_is_taken = true;
        let found = listeners(&membership).expect("fourteen more to try");
        let found = found[0].local_addr().expect("bound").port();
        assert!(found > port + 1 && found <= port + PORTS_ABOVE, "{found}");
        drop(next);
    }

    #[test]
    fn nothing_listens_on_every_interface_unless_told_to() {
        let mut membership = Membership::on_one_machine(0, 2, 1, JobToken::new("t"));
        assert_eq!(addresses(&membership), [IpAddr::V4(Ipv4Addr::LOCALHOST)]);
        membership.nnodes = 2;
        membership.master.host = "0.0.0.0".into();
        assert!(addresses(&membership).iter().all(|ip| !ip.is_unspecified()));
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        membership.bind = Some(any);
        assert_eq!(addresses(&membership), [any]);
    }
}
