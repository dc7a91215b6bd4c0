//! The sizes of a run's micro-batches: what its memory depends on.

use super::{EpochData, eval_batches};
use ferrotune_core::Result;
use ferrotune_core::config::TrainConfig;
use ferrotune_core::data::{BatchSize, Dataset, EpochPlan, Order, PackedBatch, padded_rows};
use ferrotune_core::model::Workload;
use std::collections::{BTreeMap, BTreeSet};

/// Rows, over all epochs, of which every micro-batch is looked at.
const MOST_ROWS_COUNTED: u64 = 10_000_000;

/// The micro-batches of the first `steps` steps, on any rank, and of evaluation.
pub(in crate::recipe) fn workload(
    config: &TrainConfig,
    epochs: &EpochData<'_>,
    steps: u64,
    eval_dataset: Option<&Dataset>,
) -> Result<Workload> {
    let mut sizes = epochs.sizes(steps);
    let training = sizes.one_of_each();
    let batches = eval_dataset.map(|d| eval_batches(config, d)).transpose()?;
    for batch in batches.iter().flatten() {
        sizes.add(size_of_batch(config, batch));
    }
    let tokens: usize = epochs.examples.lengths().sum();
    Ok(Workload {
        tokens: sizes.tokens,
        documents: sizes.documents,
        label_rows: sizes.label_rows,
        mean_length: tokens as f64 / epochs.examples.len().max(1) as f64,
        sizes: training,
    })
}

fn size_of_batch(config: &TrainConfig, batch: &PackedBatch) -> BatchSize {
    BatchSize {
        tokens: batch.tokens(),
        label_rows: match config.lora.classifies() {
            true => batch.sequences(),
            false => batch.trained_tokens(),
        },
        documents: batch.sequences(),
    }
}

fn sum<'a>(sizes: impl Iterator<Item = &'a BatchSize>) -> BatchSize {
    sizes.fold(BatchSize::default(), |a, b| BatchSize {
        tokens: a.tokens + b.tokens,
        label_rows: a.label_rows + b.label_rows,
        documents: a.documents + b.documents,
    })
}

/// What memory depends on of many micro-batches.
#[derive(Debug, Default)]
struct Sizes {
    tokens: usize,
    documents: usize,
    /// Rounded up to powers of two.
    label_rows: BTreeSet<usize>,
    /// By padded tokens and label rows.
    padded: BTreeMap<[usize; 2], BatchSize>,
}

impl Sizes {
    fn add(&mut self, size: BatchSize) {
        self.tokens = self.tokens.max(size.tokens);
        self.documents = self.documents.max(size.documents);
        if size.label_rows > 0 {
            self.label_rows.insert(size.label_rows.next_power_of_two());
        }
        let padded = [size.tokens, size.label_rows].map(padded_rows);
        self.padded.entry(padded).or_insert(size);
    }

    /// As few sizes as leave out no padded number of tokens and none of label rows: products depend on
    /// one or the other.
    fn one_of_each(&self) -> Vec<BatchSize> {
        let (mut tokens, mut label_rows) = (BTreeSet::new(), BTreeSet::new());
        // From the largest on, whose numbers of both are rare.
        let mut sizes = Vec::new();
        for (&[padded, padded_labels], &size) in self.padded.iter().rev() {
            let new = [tokens.insert(padded), label_rows.insert(padded_labels)];
            if new.contains(&true) {
                sizes.push(size);
            }
        }
        sizes
    }

    /// `largest`, and every smaller number of label rows.
    fn add_up_to(&mut self, largest: BatchSize) {
        self.add(largest);
        let powers = (0..usize::BITS).map(|bits| 1 << bits);
        let smaller = powers.take_while(|rows| *rows < largest.label_rows);
        self.label_rows.extend(smaller);
    }
}

impl EpochData<'_> {
    /// Sizes of every micro-batch of the first `steps` steps; if there are very many, of the largest
    /// that any order can make.
    fn sizes(&self, steps: u64) -> Sizes {
        let rows: Vec<BatchSize> = self
            .examples
            .lengths()
            .zip(self.examples.trained_tokens())
            .map(|(tokens, label_rows)| BatchSize {
                tokens,
                label_rows,
                documents: 1,
            })
            .collect();
        let size_of = |indices: &[usize]| sum(indices.iter().map(|&row| &rows[row]));
        let per_epoch = self.steps_per_epoch.max(1);
        let epochs = match self.plan.order {
            // Every epoch is the first again.
            Order::Sequential => steps.div_ceil(per_epoch).min(1),
            Order::Random => steps.div_ceil(per_epoch),
        };
        let mut sizes = Sizes::default();
        if epochs.saturating_mul(rows.len() as u64) > MOST_ROWS_COUNTED {
            let lines: Vec<BatchSize> = self.bins.iter().map(|bin| size_of(bin)).collect();
            sizes.add_up_to(largest(&lines, self.plan.per_device_train_batch_size));
            return sizes;
        }
        for epoch in 0..epochs {
            let plan = EpochPlan::packed(&self.bins, |_| 0, self.plan, epoch);
            let steps = steps.saturating_sub(epoch * per_epoch).min(per_epoch);
            for step in 0..steps {
                for rank in 0..self.plan.world_size.max(1) {
                    for micro_batch in plan.step(step as usize, rank) {
                        sizes.add(size_of(&micro_batch.rows));
                    }
                }
            }
        }
        sizes
    }
}

/// No micro-batch of `count` lines is larger.
fn largest(lines: &[BatchSize], count: usize) -> BatchSize {
    let top = |value: fn(&BatchSize) -> usize| {
        let mut values: Vec<usize> = lines.iter().map(value).collect();
        values.sort_unstable_by(|a, b| b.cmp(a));
        values.iter().take(count).sum()
    };
    BatchSize {
        tokens: top(|size| size.tokens),
        label_rows: top(|size| size.label_rows),
        documents: top(|size| size.documents),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune_core::data::Example;
    use ferrotune_core::process_group::Place;

    fn dataset(lengths: &[usize]) -> Dataset {
        let example = |&length: &usize| Example {
            input_ids: vec![1; length],
            labels: vec![1; length],
        };
        Dataset {
            examples: lengths.iter().map(example).collect(),
            ..Dataset::default()
        }
    }

    fn config(batch: usize) -> TrainConfig {
        let mut config = TrainConfig::default();
        config.data.per_device_train_batch_size = batch;
        config
    }

    #[test]
    fn the_longest_micro_batch_is_one_that_comes() {
        let lengths: Vec<usize> = (1..=64).collect();
        let (config, dataset) = (config(4), dataset(&lengths));
        let mut epochs = EpochData::new(&config, &dataset, 64, Place::SOLO);
        let workload = workload(&config, &epochs, 32, None).expect("rows are in memory");
        let batches = (0..32).flat_map(|step| {
            ferrotune_core::trainer::StepData::step(&mut epochs, step).expect("in memory")
        });
        let longest = batches.map(|b| b.tokens()).max();
        assert_eq!(Some(workload.tokens), longest);
        assert!(workload.tokens < 61 + 62 + 63 + 64, "no order was that bad");
        assert_eq!(workload.mean_length, 32.5);
    }

    #[test]
    fn every_padded_size_of_training_has_a_size() {
        let lengths: Vec<usize> = (1..=64).collect();
        let (config, dataset) = (config(4), dataset(&lengths));
        let mut epochs = EpochData::new(&config, &dataset, 64, Place::SOLO);
        let sizes = workload(&config, &epochs, 32, None)
            .expect("rows are in memory")
            .sizes;
        let batches = (0..32).flat_map(|step| {
            ferrotune_core::trainer::StepData::step(&mut epochs, step).expect("in memory")
        });
        let mut tokens = BTreeSet::new();
        for batch in batches {
            let met = |of: fn(&BatchSize) -> usize, value: usize| {
                sizes
                    .iter()
                    .any(|s| padded_rows(of(s)) == padded_rows(value))
            };
            assert!(met(|size| size.tokens, batch.tokens()));
            assert!(met(|size| size.label_rows, batch.trained_tokens()));
            tokens.insert(batch.tokens());
        }
        assert!(sizes.len() < tokens.len(), "{} sizes", sizes.len());
    }

    #[test]
    fn more_rows_than_are_looked_at_are_bounded() {
        let lengths: Vec<usize> = (1..=64).collect();
        let (config, dataset) = (config(4), dataset(&lengths));
        let epochs = EpochData::new(&config, &dataset, 64, Place::SOLO);
        let workload =
            workload(&config, &epochs, MOST_ROWS_COUNTED, None).expect("rows are in memory");
        assert_eq!(workload.tokens, 61 + 62 + 63 + 64);
        // The first token of a row is no label.
        assert_eq!(workload.label_rows.last(), Some(&256));
        assert_eq!(workload.label_rows.len(), 9);
    }

    #[test]
    fn a_run_without_steps_has_no_micro_batches() {
        let (config, dataset) = (config(2), dataset(&[5, 6]));
        let epochs = EpochData::new(&config, &dataset, 64, Place::SOLO);
        assert_eq!(
            workload(&config, &epochs, 0, None)
                .expect("rows are in memory")
                .tokens,
            0
        );
    }
}
