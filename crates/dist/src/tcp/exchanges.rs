//! The exchanges besides the ring: calls and totals, gathered bytes, a broadcast.

use super::call::Call;
use super::pump::{Exchange, Fault};

/// Everyone tells everyone which call comes, with its totals.
#[derive(Debug)]
pub(super) struct Opening<'a> {
    call: Call,
    /// The call and the totals of this rank, as sent.
    mine: &'a [u8],
    /// By rank: the same of everyone, this rank's included.
    all: &'a mut [u8],
    sent: &'a mut [usize],
    received: &'a mut [usize],
    /// By rank: what they are about to do.
    calls: &'a mut [Call],
    left: usize,
}

/// Memory that openings use again and again.
#[derive(Debug, Default)]
pub(super) struct OpeningSpace {
    mine: Vec<u8>,
    all: Vec<u8>,
    sent: Vec<usize>,
    received: Vec<usize>,
    calls: Vec<Call>,
}

impl OpeningSpace {
    /// The opening of `call` on `rank` of `world` ranks.
    pub(super) fn open(
        &mut self,
        call: Call,
        totals: &[f64],
        rank: usize,
        world: usize,
    ) -> Opening<'_> {
        self.mine.clear();
        self.mine.extend_from_slice(&call.encode());
        self.mine.extend_from_slice(bytemuck::cast_slice(totals));
        let length = self.mine.len();
        self.all.clear();
        self.all.resize(world * length, 0);
        self.all[rank * length..(rank + 1) * length].copy_from_slice(&self.mine);
        for counts in [&mut self.sent, &mut self.received] {
            counts.clear();
            counts.resize(world, 0);
            counts[rank] = length;
        }
        self.calls.clear();
        self.calls.resize(world, call);
        Opening {
            call,
            mine: &self.mine,
            all: &mut self.all,
            sent: &mut self.sent,
            received: &mut self.received,
            calls: &mut self.calls,
            left: 2 * (world - 1) * length,
        }
    }

    /// The totals of all ranks summed in rank order, once the opening is done.
    pub(super) fn sum_totals(&self, totals: &mut [f64]) {
        let length = self.mine.len();
        for (i, total) in totals.iter_mut().enumerate() {
            let at = Call::LENGTH + 8 * i;
            *total = self
                .all
                .chunks_exact(length)
                .map(|one| bytemuck::pod_read_unaligned::<f64>(&one[at..at + 8]))
                .sum();
        }
    }

    /// What each rank asked for, once the opening is done.
    pub(super) fn calls(&self) -> &[Call] {
        &self.calls
    }
}

impl Exchange for Opening<'_> {
    fn outgoing(&self, peer: usize) -> &[u8] {
        &self.mine[self.sent[peer]..]
    }

    fn sent(&mut self, peer: usize, bytes: usize) {
        self.sent[peer] += bytes;
        self.left -= bytes;
    }

    fn incoming(&mut self, peer: usize) -> &mut [u8] {
        let length = self.mine.len();
        let got = self.received[peer];
        // Totals only once the call is known to be the same: another has another number of them.
        let end = if got < Call::LENGTH {
            Call::LENGTH
        } else {
            length
        };
        &mut self.all[peer * length..][got..end]
    }

    fn received(&mut self, peer: usize, bytes: usize) -> Result<(), Fault> {
        self.received[peer] += bytes;
        self.left -= bytes;
        let got = self.received[peer];
        if got < Call::LENGTH || got - bytes >= Call::LENGTH {
            return Ok(());
        }
        match Call::decode(&self.all[peer * self.mine.len()..]) {
            Some(theirs) if self.call.agrees(&theirs) => {
                self.calls[peer] = theirs;
                Ok(())
            }
            Some(theirs) => Err(Fault::Diverged {
                peer,
                theirs: theirs.to_string(),
            }),
            None => Err(Fault::Diverged {
                peer,
                theirs: "something that is no call of this version and byte order".into(),
            }),
        }
    }

    fn is_done(&self) -> bool {
        self.left == 0
    }
}

/// Every rank sends its bytes to every other.
#[derive(Debug)]
pub(super) struct Gather<'a> {
    mine: &'a [u8],
    rank: usize,
    pub(super) all: Vec<Vec<u8>>,
    sent: Vec<usize>,
    received: Vec<usize>,
}

impl<'a> Gather<'a> {
    /// # Errors
    /// [`Fault::Local`] if there is no memory for what `calls` announce.
    pub(super) fn new(mine: &'a [u8], rank: usize, calls: &[Call]) -> Result<Self, Fault> {
        let mut all = Vec::with_capacity(calls.len());
        for (peer, call) in calls.iter().enumerate() {
            let mut bytes = Vec::new();
            let length = usize::try_from(call.bytes).unwrap_or(usize::MAX);
            bytes.try_reserve_exact(length).map_err(|_| {
                Fault::Local(format!(
                    "no memory for the {length} bytes that rank {peer} sends"
                ))
            })?;
            if peer == rank {
                bytes.extend_from_slice(mine);
            } else {
                bytes.resize(length, 0);
            }
            all.push(bytes);
        }
        let mut sent = vec![0; calls.len()];
        sent[rank] = mine.len();
        let mut received = vec![0; calls.len()];
        received[rank] = mine.len();
        Ok(Self {
            mine,
            rank,
            all,
            sent,
            received,
        })
    }
}

impl Exchange for Gather<'_> {
    fn outgoing(&self, peer: usize) -> &[u8] {
        &self.mine[self.sent[peer]..]
    }

    fn sent(&mut self, peer: usize, bytes: usize) {
        self.sent[peer] += bytes;
    }

    fn incoming(&mut self, peer: usize) -> &mut [u8] {
        &mut self.all[peer][self.received[peer]..]
    }

    fn received(&mut self, peer: usize, bytes: usize) -> Result<(), Fault> {
        debug_assert_ne!(peer, self.rank, "a rank sends nothing to itself");
        self.received[peer] += bytes;
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.sent.iter().all(|sent| *sent == self.mine.len())
            && self
                .all
                .iter()
                .zip(&self.received)
                .all(|(all, got)| all.len() == *got)
    }
}

/// Rank 0's bytes down a binomial tree, each rank passing on what has arrived.
#[derive(Debug)]
pub(super) struct Broadcast<'a> {
    bytes: &'a mut [u8],
    rank: usize,
    received: usize,
    /// Ranks to pass it on to, and how much of it they have.
    children: Vec<(usize, usize)>,
}

impl<'a> Broadcast<'a> {
    pub(super) fn new(rank: usize, world: usize, bytes: &'a mut [u8]) -> Self {
        // Rank 6 = 110b hears from 4 = 100b and tells 7 = 111b: the lowest bit set is the parent's to give.
        let below = if rank == 0 {
            world
        } else {
            rank & rank.wrapping_neg()
        };
        let children = std::iter::successors(Some(1usize), |bit| bit.checked_mul(2))
            .take_while(|bit| *bit < below)
            .map(|bit| rank + bit)
            .filter(|child| *child < world)
            .map(|child| (child, 0))
            .collect();
        let received = if rank == 0 { bytes.len() } else { 0 };
        Self {
            bytes,
            rank,
            received,
            children,
        }
    }

    fn parent(&self) -> Option<usize> {
        (self.rank > 0).then(|| self.rank & (self.rank - 1))
    }
}

impl Exchange for Broadcast<'_> {
    fn outgoing(&self, peer: usize) -> &[u8] {
        let child = self.children.iter().find(|(child, _)| *child == peer);
        child.map_or(&[], |(_, sent)| &self.bytes[*sent..self.received])
    }

    fn sent(&mut self, peer: usize, bytes: usize) {
        if let Some((_, sent)) = self.children.iter_mut().find(|(child, _)| *child == peer) {
            *sent += bytes;
        }
    }

    fn incoming(&mut self, peer: usize) -> &mut [u8] {
        if self.parent() == Some(peer) {
            &mut self.bytes[self.received..]
        } else {
            &mut []
        }
    }

    fn received(&mut self, _: usize, bytes: usize) -> Result<(), Fault> {
        self.received += bytes;
        Ok(())
    }

    fn is_done(&self) -> bool {
        let length = self.bytes.len();
        self.received == length && self.children.iter().all(|(_, sent)| *sent == length)
    }
}
