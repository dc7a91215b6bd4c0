//! Each side of a connection proves that it knows the job's token, without saying it.
//!
//! ```text
//! caller                         listener
//! Hello { subject, nonce }  ->
//!                           <-   Challenge { nonce }
//! Proof { mac }             ->
//!                           <-   Welcome { mac }   or   Refused { .. }
//! ```
//! A mac is blake3, keyed by the token, over the side that speaks, what the connection is for, and both
//! nonces.

use super::frame::MAX_STRANGER_FRAME;
use super::{Deadline, read_frame, send};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::TcpStream;

/// The secret that ranks of one job share.
///
/// It is never printed and never sent.
#[derive(Clone, PartialEq, Eq)]
pub struct JobToken([u8; 32]);

impl JobToken {
    /// The token that a secret of any length stands for.
    #[must_use]
    pub fn new(secret: &str) -> Self {
        Self(blake3::derive_key("ferrotune job token", secret.as_bytes()))
    }

    /// A token that nobody knows, for ranks within one process.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn random() -> io::Result<Self> {
        Ok(Self(random()?))
    }
}

impl fmt::Debug for JobToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobToken(***)")
    }
}

/// A number that is used once.
pub(crate) type Nonce = [u8; 16];

/// A fresh [`Nonce`].
pub(crate) fn nonce() -> io::Result<Nonce> {
    random()
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let flags = rustix::rand::GetRandomFlags::empty();
        match rustix::rand::getrandom(&mut bytes[filled..], flags) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(bytes)
}

/// What a connection is for: both sides must mean the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Subject {
    /// `store` or `data`.
    pub(crate) purpose: String,
    /// The job, and for data the one meeting of its ranks.
    pub(crate) job: String,
}

#[derive(Debug, Serialize, Deserialize)]
enum Greeting {
    Hello { subject: Subject, nonce: Nonce },
    Challenge { nonce: Nonce },
    Proof { mac: [u8; 32] },
    Welcome { mac: [u8; 32] },
    Refused(Refused),
}

/// Why a handshake failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Refused {
    /// The other side does not know the token, or another one.
    WrongToken,
    /// It knows the token and serves something else: this.
    WrongJob(String),
}

/// Why there is no connection to a member.
#[derive(Debug)]
pub(crate) enum GreetError {
    /// The other side said no, or is not who it should be.
    Refused(Refused),
    /// No ferrotune there, too slow, or the connection broke.
    Io(io::Error),
}

impl From<io::Error> for GreetError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The caller's half.
pub(crate) fn greet(
    stream: &TcpStream,
    subject: &Subject,
    token: &JobToken,
    deadline: &Deadline,
) -> Result<(), GreetError> {
    let mine = nonce()?;
    let hello = Greeting::Hello {
        subject: subject.clone(),
        nonce: mine,
    };
    send(stream, &hello)?;
    let theirs = match read_frame(stream, MAX_STRANGER_FRAME, deadline)? {
        Greeting::Challenge { nonce } => nonce,
        other => return Err(unexpected(&other).into()),
    };
    let mac = |side| mac(token, side, subject, &mine, &theirs);
    let proof = Greeting::Proof {
        mac: *mac("caller").as_bytes(),
    };
    send(stream, &proof)?;
    match read_frame(stream, MAX_STRANGER_FRAME, deadline)? {
        // Hashes compare in constant time.
        Greeting::Welcome { mac: theirs } if mac("listener") == blake3::Hash::from(theirs) => {
            Ok(())
        }
        Greeting::Welcome { .. } => Err(GreetError::Refused(Refused::WrongToken)),
        Greeting::Refused(refused) => Err(GreetError::Refused(refused)),
        other => Err(unexpected(&other).into()),
    }
}

/// The listener's half.
pub(crate) fn answer(
    stream: &TcpStream,
    subject: &Subject,
    token: &JobToken,
    deadline: &Deadline,
) -> Result<(), GreetError> {
    let (asked, theirs) = match read_frame(stream, MAX_STRANGER_FRAME, deadline)? {
        Greeting::Hello { subject, nonce } => (subject, nonce),
        other => return Err(unexpected(&other).into()),
    };
    let mine = nonce()?;
    send(stream, &Greeting::Challenge { nonce: mine })?;
    let proof = match read_frame(stream, MAX_STRANGER_FRAME, deadline)? {
        Greeting::Proof { mac } => mac,
        other => return Err(unexpected(&other).into()),
    };
    let mac = |side| mac(token, side, &asked, &theirs, &mine);
    if mac("caller") != blake3::Hash::from(proof) {
        send(stream, &Greeting::Refused(Refused::WrongToken))?;
        return Err(GreetError::Refused(Refused::WrongToken));
    }
    if asked != *subject {
        let here = Refused::WrongJob(subject.job.clone());
        send(stream, &Greeting::Refused(here))?;
        return Err(GreetError::Refused(Refused::WrongJob(asked.job)));
    }
    let welcome = Greeting::Welcome {
        mac: *mac("listener").as_bytes(),
    };
    Ok(send(stream, &welcome)?)
}

fn mac(
    token: &JobToken,
    side: &str,
    subject: &Subject,
    caller: &Nonce,
    listener: &Nonce,
) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(&token.0);
    for part in [
        side.as_bytes(),
        subject.purpose.as_bytes(),
        subject.job.as_bytes(),
        caller,
        listener,
    ] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize()
}

fn unexpected(greeting: &Greeting) -> io::Error {
    let name = match greeting {
        Greeting::Hello { .. } => "Hello",
        Greeting::Challenge { .. } => "Challenge",
        Greeting::Proof { .. } => "Proof",
        Greeting::Welcome { .. } => "Welcome",
        Greeting::Refused(_) => "Refused",
    };
    io::Error::new(ErrorKind::InvalidData, format!("{name} out of turn"))
}
