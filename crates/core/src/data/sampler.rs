//! Which rows each optimizer step of an epoch reads, on which rank.
//!
//! The list of micro-batches is made before ranks are assigned and depends on the seed and the
//! epoch alone, so the same rows meet in the same optimizer step for any split of them. Which rank
//! computes which micro-batch of a step is chosen so that all have about as much to do.

use ferrotune_kernels::rng::{Stream, key_for, mix};

/// The order of rows (`train_sampling_strategy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Shuffled anew in every epoch (`random`).
    #[default]
    Random,
    /// As in the data set (`sequential`).
    Sequential,
}

/// How rows are cut into micro-batches and optimizer steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Rows (or packed bins) of one micro-batch.
    pub per_device_train_batch_size: usize,
    /// Micro-batches that each rank accumulates in an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Order of rows.
    pub order: Order,
    /// Seed of the order (`data_seed`, else `seed`).
    pub seed: u64,
}

/// One micro-batch of one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Indices of examples, in order; none where the step has no more rows for this rank.
    pub rows: Vec<usize>,
    /// The id of the first document; the others count on. Ids number the documents of the whole
    /// optimizer step in global order, so random draws do not depend on the split.
    pub first_sequence_id: u64,
}

impl MicroBatch {
    /// Each document's id and index.
    pub fn documents(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        (self.first_sequence_id..).zip(self.rows.iter().copied())
    }
}

/// The rows of one epoch, in order, cut into optimizer steps.
#[derive(Clone, Debug)]
pub struct EpochPlan {
    groups: Vec<Group>,
    plan: BatchPlan,
}

/// A row, or a packed bin of rows, which stay together.
#[derive(Clone, Debug)]
struct Group {
    rows: Vec<usize>,
    cost: u64,
}

impl EpochPlan {
    /// The plan of an epoch over single examples, numbered `0..rows`.
    #[must_use]
    pub fn new(rows: usize, plan: BatchPlan, epoch: u64) -> Self {
        let bins: Vec<_> = (0..rows).map(|i| vec![i]).collect();
        Self::packed(&bins, |_| 1, plan, epoch)
    }

    /// The plan of an epoch over packed bins of examples; a bin counts as one row. `cost` of an example,
    /// in any unit, is what ranks are balanced by.
    #[must_use]
    pub fn packed(
        bins: &[Vec<usize>],
        cost: impl Fn(usize) -> u64,
        plan: BatchPlan,
        epoch: u64,
    ) -> Self {
        let group = |rows: &Vec<usize>| Group {
            rows: rows.clone(),
            cost: rows.iter().map(|&row| cost(row)).sum(),
        };
        let mut groups: Vec<Group> = bins.iter().map(group).collect();
        if plan.order == Order::Random {
            Stream::new(mix(key_for(plan.seed, "epoch order"), epoch)).shuffle(&mut groups);
        }
        Self { groups, plan }
    }

    fn rows_per_micro_batch(&self) -> usize {
        self.plan.per_device_train_batch_size.max(1)
    }

    fn micro_batches_per_step(&self) -> usize {
        self.plan.gradient_accumulation_steps.max(1) * self.plan.world_size.max(1)
    }

    /// Optimizer steps of the epoch. The last may have fewer rows.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.groups
            .len()
            .div_ceil(self.rows_per_micro_batch())
            .div_ceil(self.micro_batches_per_step())
    }

    /// The micro-batches of `rank` in a step (from 0) of the epoch, in their global order. Every rank has
    /// as many as every other; the last of them may be empty.
    #[must_use]
    pub fn step(&self, step_in_epoch: usize, rank: usize) -> Vec<MicroBatch> {
        let world = self.plan.world_size.max(1);
        let per_step = self.micro_batches_per_step() * self.rows_per_micro_batch();
        let begin = step_in_epoch
            .saturating_mul(per_step)
            .min(self.groups.len());
        let end = begin.saturating_add(per_step).min(self.groups.len());
        let mut batches: Vec<&[Group]> = self.groups[begin..end]
            .chunks(self.rows_per_micro_batch())
            .collect();
        batches.resize(batches.len().div_ceil(world) * world, &[]);
        let costs: Vec<u64> = batches
            .iter()
            .map(|groups| groups.iter().map(|g| g.cost).sum())
            .collect();
        let ranks = balance(&costs, world);
        let mut first_sequence_id = 0;
        let mut mine = Vec::new();
        for (groups, owner) in batches.into_iter().zip(ranks) {
            let rows: Vec<usize> = groups.iter().flat_map(|g| g.rows.clone()).collect();
            let documents = rows.len() as u64;
            if owner == rank {
                mine.push(MicroBatch {
                    rows,
                    first_sequence_id,
                });
            }
            first_sequence_id += documents;
        }
        mine
    }
}

/// The rank of each of `costs`, a multiple of `world` of them: as many for each rank, and about as much.
///
/// The dearest first, each to the rank that has least so far (Graham's longest-processing-time rule, with
/// equal numbers).
fn balance(costs: &[u64], world: usize) -> Vec<usize> {
    let mut dearest_first: Vec<usize> = (0..costs.len()).collect();
    dearest_first.sort_by_key(|&i| (std::cmp::Reverse(costs[i]), i));
    let mut load = vec![(0_u64, 0_usize); world];
    let mut ranks = vec![0; costs.len()];
    for i in dearest_first {
        let open = (0..world).filter(|&rank| load[rank].1 < costs.len() / world);
        // Equal loads go by number, so that equal costs are dealt in turn.
        let rank = open.min_by_key(|&rank| (load[rank], rank)).unwrap_or(0);
        load[rank].0 = load[rank].0.saturating_add(costs[i]);
        load[rank].1 += 1;
        ranks[i] = rank;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn plan(batch: usize, accumulation: usize, world: usize) -> BatchPlan {
        BatchPlan {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            world_size: world,
            order: Order::Random,
            seed: 42,
        }
    }

    /// Id and row of every document of a step, over all ranks.
    fn documents(plan: &EpochPlan, step: usize) -> BTreeMap<u64, usize> {
        let ranks = 0..plan.plan.world_size;
        let all: Vec<(u64, usize)> = ranks
            .flat_map(|rank| plan.step(step, rank))
            .flat_map(|batch| batch.documents().collect::<Vec<_>>())
            .collect();
        let map: BTreeMap<u64, usize> = all.iter().copied().collect();
        assert_eq!(map.len(), all.len(), "an id appears twice");
        map
    }

    #[test]
    fn the_same_rows_meet_in_a_step_for_any_split() {
        for rows in [0, 1, 7, 8, 9, 23, 64] {
            let whole = EpochPlan::new(rows, plan(8, 1, 1), 3);
            for (batch, accumulation, world) in [(1, 8, 1), (2, 4, 1), (1, 2, 4), (2, 1, 4)] {
                let split = EpochPlan::new(rows, plan(batch, accumulation, world), 3);
                assert_eq!(whole.steps(), split.steps());
                for step in 0..whole.steps() {
                    assert_eq!(documents(&whole, step), documents(&split, step));
                }
            }
        }
    }

    #[test]
    fn every_row_is_read_once_and_ranks_have_equally_many_micro_batches() {
        for rows in 0..40 {
            for (batch, accumulation, world) in [(1, 1, 1), (3, 2, 1), (2, 2, 3), (1, 4, 2)] {
                let epoch = EpochPlan::new(rows, plan(batch, accumulation, world), 0);
                let mut seen = Vec::new();
                for step in 0..epoch.steps() {
                    let counts: Vec<usize> = (0..world)
                        .map(|rank| epoch.step(step, rank).len())
                        .collect();
                    assert!(counts.iter().all(|c| *c == counts[0] && *c <= accumulation));
                    seen.extend(documents(&epoch, step).into_values());
                }
                seen.sort_unstable();
                assert_eq!(seen, (0..rows).collect::<Vec<_>>());
                if world == 1 {
                    assert_eq!(epoch.steps(), rows.div_ceil(batch).div_ceil(accumulation));
                }
            }
        }
    }

    #[test]
    fn the_order_is_a_function_of_seed_and_epoch() {
        let rows = |seed, epoch| {
            let plan = BatchPlan {
                seed,
                ..plan(50, 1, 1)
            };
            EpochPlan::new(50, plan, epoch).step(0, 0)[0].rows.clone()
        };
        assert_eq!(rows(1, 0), rows(1, 0));
        assert_ne!(rows(1, 0), rows(1, 1));
        assert_ne!(rows(1, 0), rows(2, 0));
        let sequential = BatchPlan {
            order: Order::Sequential,
            ..plan(50, 1, 1)
        };
        assert_eq!(
            EpochPlan::new(50, sequential, 7).step(0, 0)[0].rows,
            (0..50).collect::<Vec<_>>()
        );
    }

    #[test]
    fn documents_of_a_bin_stay_together_and_each_has_an_id() {
        let bins = vec![vec![4, 1], vec![0], vec![2, 3, 5]];
        let sequential = BatchPlan {
            order: Order::Sequential,
            ..plan(1, 2, 2)
        };
        let epoch = EpochPlan::packed(&bins, |_| 0, sequential, 0);
        assert_eq!(epoch.steps(), 1);
        let batch = |rows: &[usize], first_sequence_id| MicroBatch {
            rows: rows.to_vec(),
            first_sequence_id,
        };
        assert_eq!(epoch.step(0, 0), [batch(&[4, 1], 0), batch(&[2, 3, 5], 3)]);
        assert_eq!(epoch.step(0, 1), [batch(&[0], 2), batch(&[], 6)]);
        assert!(epoch.step(1, 0).is_empty());
    }

    #[test]
    fn ranks_have_about_as_much_to_do() {
        let bins: Vec<Vec<usize>> = (0..8).map(|i| vec![i]).collect();
        let costs = [90, 10, 10, 10, 80, 30, 40, 50];
        let sequential = BatchPlan {
            order: Order::Sequential,
            ..plan(1, 4, 2)
        };
        let epoch = EpochPlan::packed(&bins, |row| costs[row], sequential, 0);
        let load = |rank| -> u64 {
            let batches = epoch.step(0, rank);
            assert_eq!(batches.len(), 4);
            let ids: Vec<u64> = batches.iter().map(|b| b.first_sequence_id).collect();
            assert!(ids.is_sorted(), "{ids:?}");
            batches
                .iter()
                .flat_map(|b| &b.rows)
                .map(|&r| costs[r])
                .sum()
        };
        assert_eq!(load(0) + load(1), 320);
        // In turn it would be 220 and 100.
        assert!(load(0).abs_diff(load(1)) <= 20, "{} {}", load(0), load(1));
    }
}
