//! Options of sockets, and connecting with a deadline.

use super::Deadline;
use rustix::net::sockopt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Bytes that a data connection may hold in the kernel, each way, where the system allows as much.
const DATA_BUFFER: usize = 4 << 20;

/// Connects within `limit`, or before `deadline`.
pub(crate) fn dial(
    address: SocketAddr,
    deadline: &Deadline,
    limit: Duration,
) -> io::Result<TcpStream> {
    let left = deadline.left().min(limit).max(Duration::from_millis(1));
    let stream = TcpStream::connect_timeout(&address, left)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A control connection: what cannot be delivered for `dead_after` ends it.
pub(crate) fn tune_control(stream: &TcpStream, dead_after: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(dead_after))?;
    stream.set_write_timeout(Some(dead_after))?;
    keep_alive(stream, dead_after)?;
    user_timeout(stream, dead_after)
}

/// A data connection. A peer that computes for long lets its buffers fill up, which the kernel takes for
/// undelivered too, so only the deadline of a whole call ends it.
pub(crate) fn tune_data(
    stream: &TcpStream,
    dead_after: Duration,
    call: Duration,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    sockopt::set_socket_send_buffer_size(stream, DATA_BUFFER)?;
    sockopt::set_socket_recv_buffer_size(stream, DATA_BUFFER)?;
    keep_alive(stream, dead_after)?;
    user_timeout(stream, call)
}

/// Probes an idle connection once a second, until `dead_after` without an answer.
fn keep_alive(stream: &TcpStream, dead_after: Duration) -> io::Result<()> {
    let probes = u32::try_from(dead_after.as_secs().clamp(1, 100)).unwrap_or(100);
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(stream, probes)?;
    Ok(())
}

#[cfg(target_os = "linux")]
fn user_timeout(stream: &TcpStream, time: Duration) -> io::Result<()> {
    let milliseconds = u32::try_from(time.as_millis().max(1)).unwrap_or(u32::MAX);
    Ok(sockopt::set_tcp_user_timeout(stream, milliseconds)?)
}

/// Heartbeats and deadlines alone tell elsewhere.
#[cfg(not(target_os = "linux"))]
fn user_timeout(_: &TcpStream, _: Duration) -> io::Result<()> {
    Ok(())
}
