//! Ranks as threads of one process.

use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One rank of a group of threads. Sums are taken in rank order, so their bits do not depend on
/// which thread arrives first.
#[derive(Debug)]
pub struct Local {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    world_size: usize,
    timeout: Duration,
    state: Mutex<Round>,
    changed: Condvar,
}

/// One exchange: every rank puts its contribution, then every rank takes all of them.
#[derive(Debug, Default)]
struct Round {
    contributions: Vec<Option<Vec<u64>>>,
    taken: usize,
    /// A rank left, or waited too long: every later call fails.
    poisoned: Option<String>,
}

impl Local {
    /// All ranks of a group of `world_size` threads. A call that waits longer than `timeout` for
    /// its peers fails, and with it the group.
    #[must_use]
    pub fn group(world_size: usize, timeout: Duration) -> Vec<Self> {
        let round = Round {
            contributions: vec![None; world_size],
            ..Round::default()
        };
        let shared = Arc::new(Shared {
            world_size,
            timeout,
            state: Mutex::new(round),
            changed: Condvar::new(),
        });
        (0..world_size)
            .map(|rank| Self {
                rank,
                shared: Arc::clone(&shared),
            })
            .collect()
    }

    /// Everyone's words, by rank.
    fn exchange(&self, words: Vec<u64>) -> Result<Vec<Vec<u64>>> {
        let deadline = Instant::now() + self.shared.timeout;
        let mut round = self.lock();
        // The previous round may not have been taken by everyone yet.
        round = self.wait(round, deadline, |r| r.contributions[self.rank].is_none())?;
        round.contributions[self.rank] = Some(words);
        self.shared.changed.notify_all();
        round = self.wait(round, deadline, |r| {
            r.contributions.iter().all(Option::is_some)
        })?;
        let all: Vec<Vec<u64>> = round.contributions.iter().flatten().cloned().collect();
        round.taken += 1;
        if round.taken == self.shared.world_size {
            round.taken = 0;
            round.contributions.iter_mut().for_each(|c| *c = None);
            self.shared.changed.notify_all();
        } else {
            round = self.wait(round, deadline, |r| r.contributions[self.rank].is_none())?;
        }
        drop(round);
        let length = all[self.rank].len();
        match all.iter().position(|words| words.len() != length) {
            None => Ok(all),
            Some(peer) => Err(self.poison(&format!(
                "ranks diverged: rank {} reduces {length} words, rank {peer} {}",
                self.rank,
                all[peer].len()
            ))),
        }
    }

    fn wait<'a>(
        &'a self,
        mut round: MutexGuard<'a, Round>,
        deadline: Instant,
        ready: impl Fn(&Round) -> bool,
    ) -> Result<MutexGuard<'a, Round>> {
        loop {
            // A round that is complete counts, even if a peer that has taken its share left since.
            if ready(&round) {
                return Ok(round);
            }
            if let Some(message) = &round.poisoned {
                return Err(Error::Transient {
                    message: message.clone(),
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(round);
                return Err(
                    self.poison(&format!("rank {} waited too long for its peers", self.rank))
                );
            }
            round = self
                .shared
                .changed
                .wait_timeout(round, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn poison(&self, message: &str) -> Error {
        let mut round = self.lock();
        let message = round
            .poisoned
            .get_or_insert_with(|| message.to_owned())
            .clone();
        self.shared.changed.notify_all();
        Error::Transient { message }
    }

    fn lock(&self) -> MutexGuard<'_, Round> {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Local {
    /// Peers that still wait for this rank learn that it is gone.
    fn drop(&mut self) {
        self.poison(&format!("rank {} left the group", self.rank));
    }
}

impl ProcessGroup for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.shared.world_size
    }

    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<()> {
        let words = buffer.iter().map(|v| u64::from(v.to_bits())).collect();
        let all = self.exchange(words)?;
        for (i, value) in buffer.iter_mut().enumerate() {
            *value = all
                .iter()
                .map(|words| f32::from_bits(words[i] as u32))
                .sum();
        }
        Ok(())
    }

    fn all_reduce_counts(&mut self, counts: &mut [u64]) -> Result<()> {
        let all = self.exchange(counts.to_vec())?;
        for (i, count) in counts.iter_mut().enumerate() {
            *count = all.iter().map(|words| words[i]).sum();
        }
        Ok(())
    }

    fn all_reduce_sums(&mut self, sums: &mut [f64]) -> Result<()> {
        let all = self.exchange(sums.iter().map(|v| v.to_bits()).collect())?;
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = all.iter().map(|words| f64::from_bits(words[i])).sum();
        }
        Ok(())
    }

    fn broadcast(&mut self, buffer: &mut [f32]) -> Result<()> {
        let all = self.exchange(buffer.iter().map(|v| u64::from(v.to_bits())).collect())?;
        for (value, word) in buffer.iter_mut().zip(&all[0]) {
            *value = f32::from_bits(*word as u32);
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        self.exchange(Vec::new()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn on_each_rank<R: Send>(world: usize, body: impl Fn(Local) -> R + Sync) -> Vec<R> {
        let body = &body;
        thread::scope(|scope| {
            let ranks = Local::group(world, Duration::from_secs(20));
            let threads: Vec<_> = ranks
                .into_iter()
                .map(|r| scope.spawn(move || body(r)))
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().expect("rank panicked"))
                .collect()
        })
    }

    #[test]
    fn reductions_agree_on_every_rank_over_many_rounds() {
        let results = on_each_rank(3, |mut group| {
            let mut last = Vec::new();
            for round in 0..50 {
                let rank = group.rank();
                let mut floats = vec![rank as f32 + 0.1, round as f32];
                group.all_reduce(&mut floats).expect("peers live");
                let mut counts = [rank as u64];
                group.all_reduce_counts(&mut counts).expect("peers live");
                assert_eq!(counts, [3]);
                let mut same = [rank as f32];
                group.broadcast(&mut same).expect("peers live");
                assert_eq!(same, [0.0]);
                last = floats;
            }
            group.barrier().expect("peers live");
            last
        });
        assert!(results.iter().all(|r| r == &results[0]));
        assert_eq!(results[0][1], 3.0 * 49.0);
    }

    #[test]
    fn a_rank_that_leaves_is_an_error_on_the_others_not_a_hang() {
        let results = on_each_rank(2, |mut group| {
            if group.rank() == 1 {
                Ok(())
            } else {
                group.barrier()
            }
        });
        assert!(
            matches!(&results[0], Err(Error::Transient { message }) if message.contains("rank 1"))
        );
    }

    #[test]
    fn a_rank_that_leaves_after_the_last_round_takes_nothing_from_the_others() {
        for _ in 0..200 {
            let results = on_each_rank(3, |mut group| {
                let mut sum = [1.0];
                group.all_reduce(&mut sum).map(|()| sum)
            });
            for sum in results {
                assert_eq!(sum.expect("the round was complete"), [3.0]);
            }
        }
    }

    #[test]
    fn diverging_lengths_are_an_error_on_both_sides() {
        let results = on_each_rank(2, |mut group| {
            let mut buffer = vec![0.0; 1 + group.rank()];
            group.all_reduce(&mut buffer)
        });
        assert!(results.iter().all(Result::is_err));
    }
}
