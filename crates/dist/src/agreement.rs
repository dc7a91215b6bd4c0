//! What ranks tell each other over a host group before a library sums for them: a divergence is an error
//! that names both sides, and no hang.

use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, Result};

/// What a rank is about to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) what: String,
    /// Number of the call, from 0.
    pub(crate) call: u64,
    /// Optimizer step, from 0.
    pub(crate) step: u64,
    /// Elements.
    pub(crate) len: u64,
    /// Elements that are summed at a time.
    pub(crate) bucket: u64,
}

impl Header {
    fn describe(&self) -> String {
        let Self {
            what,
            call,
            step,
            len,
            ..
        } = self;
        let megabytes = self.bucket as f64 * 4.0 / f64::from(1 << 20);
        format!("{what} of {len} values in buckets of {megabytes} MiB (call {call}, step {step})")
    }

    /// Everyone's totals summed in rank order, if everyone is about to do the same.
    ///
    /// # Errors
    /// [`Error::Transient`] if a peer is lost, or naming two ranks that are about to do different things.
    pub(crate) fn exchange(&self, host: &mut dyn ProcessGroup, totals: &mut [f64]) -> Result<()> {
        let words = [
            self.call,
            self.step,
            self.len,
            self.bucket,
            totals.len() as u64,
        ];
        let mut bytes = self.what.clone().into_bytes();
        bytes.resize(NAME, 0);
        bytes.extend_from_slice(bytemuck::cast_slice(&words));
        let head = bytes.len();
        bytes.extend_from_slice(bytemuck::cast_slice(totals));
        let all = host.all_gather(&bytes)?;
        let differs = |peer: &Vec<u8>| peer.len() != bytes.len() || peer[..head] != bytes[..head];
        if let Some(peer) = all.iter().position(differs) {
            let message = format!(
                "ranks diverged: rank {} asks for {}, rank {peer} for {}",
                host.rank(),
                self.describe(),
                Self::read(&all[peer]).map_or_else(|| "something else".into(), |h| h.describe())
            );
            return Err(Error::Transient { message });
        }
        for (i, total) in totals.iter_mut().enumerate() {
            let at = head + i * size_of::<f64>();
            let read = |peer: &Vec<u8>| {
                bytemuck::pod_read_unaligned::<f64>(&peer[at..at + size_of::<f64>()])
            };
            *total = all.iter().map(read).sum();
        }
        Ok(())
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (name, rest) = bytes.split_at_checked(NAME)?;
        let word = |i: usize| {
            let bytes = rest.get(i * 8..i * 8 + 8)?;
            Some(bytemuck::pod_read_unaligned::<u64>(bytes))
        };
        let what = String::from_utf8_lossy(name);
        Some(Self {
            what: what.trim_end_matches('\0').to_owned(),
            call: word(0)?,
            step: word(1)?,
            len: word(2)?,
            bucket: word(3)?,
        })
    }
}

/// Bytes of an operation's name in a [`Header`].
const NAME: usize = 16;
