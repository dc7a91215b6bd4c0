//! Ranks as threads of one process.

use ferrotune_core::params::FlatBuffer;
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
    contributions: Vec<Option<Contribution>>,
    taken: usize,
    /// The first step that no rank has begun.
    next_step: u64,
    /// The step before which the run ends, once a rank was asked to stop.
    stop_before: Option<u64>,
    /// A rank left, or waited too long: every later call fails.
    poisoned: Option<String>,
}

/// What one rank brings to an exchange, and what it wants done with it.
#[derive(Clone, Debug)]
struct Contribution {
    operation: &'static str,
    bytes: Vec<u8>,
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

    /// Everyone's bytes, by rank. With `same_length`, a rank that brings another number of bytes than
    /// this one has diverged.
    fn exchange(
        &self,
        operation: &'static str,
        bytes: Vec<u8>,
        same_length: bool,
    ) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + self.shared.timeout;
        let mut round = self.lock();
        // The previous round may not have been taken by everyone yet.
        round = self.wait(round, deadline, |r| r.contributions[self.rank].is_none())?;
        let length = bytes.len();
        round.contributions[self.rank] = Some(Contribution { operation, bytes });
        self.shared.changed.notify_all();
        round = self.wait(round, deadline, |r| {
            r.contributions.iter().all(Option::is_some)
        })?;
        let all: Vec<Contribution> = round.contributions.iter().flatten().cloned().collect();
        round.taken += 1;
        if round.taken == self.shared.world_size {
            round.taken = 0;
            round.contributions.iter_mut().for_each(|c| *c = None);
            self.shared.changed.notify_all();
        } else {
            round = self.wait(round, deadline, |r| r.contributions[self.rank].is_none())?;
        }
        drop(round);
        let differs = |peer: &Contribution| {
            peer.operation != operation || (same_length && peer.bytes.len() != length)
        };
        match all.iter().position(differs) {
            None => Ok(all.into_iter().map(|c| c.bytes).collect()),
            Some(peer) => Err(self.poison(&format!(
                "ranks diverged: rank {} asks for {operation} of {length} bytes, rank {peer} for {} of {}",
                self.rank,
                all[peer].operation,
                all[peer].bytes.len()
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

    fn begin_step(&mut self, step: u64, stop: bool) -> Result<bool> {
        let mut round = self.lock();
        if stop && round.stop_before.is_none() {
            round.stop_before = Some(round.next_step.max(step));
        }
        let ends = round.stop_before.is_some_and(|end| step >= end);
        // A peer that ended here has left already.
        if ends {
            return Ok(true);
        }
        if let Some(message) = &round.poisoned {
            let message = message.clone();
            return Err(Error::Transient { message });
        }
        round.next_step = round.next_step.max(step + 1);
        Ok(false)
    }

    fn all_reduce(&mut self, buffer: &mut FlatBuffer, totals: &mut [f64]) -> Result<()> {
        let values = buffer.as_mut_slice();
        let mut bytes: Vec<u8> = bytemuck::cast_slice(totals).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(values));
        let all = self.exchange("all_reduce", bytes, true)?;
        let rest = size_of_val(totals);
        for (i, total) in totals.iter_mut().enumerate() {
            *total = all.iter().map(|b| read::<f64>(b, i)).sum();
        }
        for (i, value) in values.iter_mut().enumerate() {
            *value = all.iter().map(|b| read::<f32>(&b[rest..], i)).sum();
        }
        Ok(())
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.exchange("all_gather", bytes.to_vec(), false)
    }

    fn broadcast(&mut self, buffer: &mut FlatBuffer) -> Result<()> {
        let values = buffer.as_mut_slice();
        let all = self.exchange("broadcast", bytemuck::cast_slice(values).to_vec(), true)?;
        for (i, value) in values.iter_mut().enumerate() {
            *value = read(&all[0], i);
        }
        Ok(())
    }
}

/// Element `i` of an array of `T` that need not be aligned.
fn read<T: bytemuck::AnyBitPattern>(bytes: &[u8], i: usize) -> T {
    bytemuck::pod_read_unaligned(&bytes[i * size_of::<T>()..(i + 1) * size_of::<T>()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune_core::params::{ParamLayoutBuilder, ParamSpec};
    use std::thread;

    /// A buffer of one tensor.
    fn buffer(values: &[f32]) -> FlatBuffer {
        let mut layout = ParamLayoutBuilder::new();
        let id = layout.add(ParamSpec::new("w", [values.len()], 0));
        let mut buffer = FlatBuffer::zeros(&layout.build().expect("one tensor"));
        buffer.get_mut(id).copy_from_slice(values);
        buffer
    }

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
                let mut floats = buffer(&[rank as f32 + 0.1, round as f32]);
                let mut totals = [rank as f64];
                group
                    .all_reduce(&mut floats, &mut totals)
                    .expect("peers live");
                assert_eq!(totals, [3.0]);
                group.sum_totals(&mut totals).expect("peers live");
                assert_eq!(totals, [9.0]);
                let mut same = buffer(&[rank as f32]);
                group.broadcast(&mut same).expect("peers live");
                assert_eq!(same.as_slice()[0], 0.0);
                let bytes = vec![rank as u8; rank];
                let all = group.all_gather(&bytes).expect("peers live");
                assert_eq!(all, [vec![], vec![1], vec![2, 2]]);
                last = floats.as_slice().to_vec();
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
                group.sum_totals(&mut sum).map(|()| sum)
            });
            for sum in results {
                assert_eq!(sum.expect("the round was complete"), [3.0]);
            }
        }
    }

    #[test]
    fn diverging_calls_are_an_error_on_both_sides() {
        let lengths = on_each_rank(2, |mut group| {
            let mut buffer = buffer(&vec![0.0; 1 + 8 * group.rank()]);
            group.all_reduce(&mut buffer, &mut [])
        });
        assert!(lengths.iter().all(Result::is_err));
        let operations = on_each_rank(2, |mut group| {
            if group.rank() == 0 {
                group.barrier()
            } else {
                group.broadcast(&mut buffer(&[]))
            }
        });
        for error in operations {
            let message = error.expect_err("they asked for two things").to_string();
            assert!(message.contains("all_gather") && message.contains("broadcast"));
        }
    }

    #[test]
    fn every_rank_ends_before_the_same_step() {
        for asked in 0..3 {
            let ends = on_each_rank(3, |mut group| {
                let mut step = 0;
                loop {
                    let stop = group.rank() == asked && step >= 5;
                    if group.begin_step(step, stop).expect("peers live") {
                        return step;
                    }
                    group.barrier().expect("peers live");
                    step += 1;
                }
            });
            assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
            assert!((5..=6).contains(&ends[0]), "{ends:?}");
        }
    }
}
