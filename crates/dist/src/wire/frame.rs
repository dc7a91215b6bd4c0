//! Frames: magic, version, length, then a message as JSON.

use super::Deadline;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const MAGIC: [u8; 4] = *b"FTRN";
const VERSION: u32 = 1;
const HEADER: usize = 12;
/// Largest message of someone who has not proved the token yet.
pub(crate) const MAX_STRANGER_FRAME: usize = 4 << 10;
/// Largest message of a member: room for a table of some ten thousand ranks.
pub(crate) const MAX_MEMBER_FRAME: usize = 8 << 20;

/// `message` as a frame.
pub(crate) fn frame<M: Serialize>(message: &M) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(|_| invalid("message too long".into()))?;
    let mut frame = Vec::with_capacity(HEADER + body.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&VERSION.to_le_bytes());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Writes `message` as a frame.
pub(crate) fn send<M: Serialize>(mut stream: &TcpStream, message: &M) -> io::Result<()> {
    stream.write_all(&frame(message)?)
}

/// Reads a message of at most `max` bytes before `deadline`.
///
/// # Errors
/// [`ErrorKind::InvalidData`] if it is no frame or no such message, [`ErrorKind::TimedOut`] if it is not
/// there in time, [`ErrorKind::UnexpectedEof`] if the other side closed.
pub(crate) fn read_frame<M: DeserializeOwned>(
    stream: &TcpStream,
    max: usize,
    deadline: &Deadline,
) -> io::Result<M> {
    let mut header = [0; HEADER];
    read_exact(stream, &mut header, deadline)?;
    let length = body_length(&header, max)?;
    let mut body = vec![0; length];
    read_exact(stream, &mut body, deadline)?;
    serde_json::from_slice(&body).map_err(|e| invalid(format!("not a message: {e}")))
}

/// The length that a header announces.
fn body_length(header: &[u8; HEADER], max: usize) -> io::Result<usize> {
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i]));
    if header[..4] != MAGIC {
        return Err(invalid("not a frame of ferrotune".into()));
    }
    if word(4) != VERSION {
        let message = format!("protocol version {}, expected {VERSION}", word(4));
        return Err(invalid(message));
    }
    let length = word(8) as usize;
    if length > max {
        return Err(invalid(format!("a frame of {length} bytes, at most {max}")));
    }
    Ok(length)
}

fn read_exact(mut stream: &TcpStream, mut to: &mut [u8], deadline: &Deadline) -> io::Result<()> {
    while !to.is_empty() {
        let left = deadline.left();
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(to) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => to = &mut to[n..],
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn invalid(message: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_held_to_magic_version_and_cap() {
        let good = frame(&"abc").expect("a short message");
        let header: [u8; HEADER] = good[..HEADER].try_into().expect("the header");
        assert_eq!(body_length(&header, 5).expect("in range"), 5);
        assert!(body_length(&header, 4).is_err(), "above the cap");
        for byte in 0..8 {
            let mut bad = header;
            bad[byte] ^= 1;
            assert!(body_length(&bad, 5).is_err(), "byte {byte}");
        }
        let mut huge = header;
        huge[8..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(body_length(&huge, MAX_MEMBER_FRAME).is_err());
    }
}
