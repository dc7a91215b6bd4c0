//! Changes to a configuration with which a run that is too large for the machine would fit.

#[cfg(test)]
mod tests;

use super::adapter::{self, Attached};
use super::memory::{Base, highest_rank, least_trained};
use super::{Recipe, data};
use ferrotune_core::config::{DataArguments, TrainConfig};
use ferrotune_core::model::Workload;

/// A suggestion leaves one part in so many free: memory comes and goes from one start to the next.
const SPARE: u64 = 16;
/// Rows shorter than this are no training worth a suggestion.
const SHORTEST: usize = 16;

/// Changes that make the run fit, at the largest value that does: of one key, else of several
/// together. Each was put through the check that refused the run.
///
/// Without `rows`, activations are not counted; without `attached`, the scalars that `config` trains
/// are too many to lay out.
pub(super) fn changes(
    config: &TrainConfig,
    base: Base<'_>,
    attached: Option<&Attached>,
    rows: Option<&Rows>,
    available: u64,
) -> Vec<String> {
    let search = Search {
        config,
        base,
        attached,
        rows,
        budget: available - available / SPARE,
    };
    let mut found = search.one_key();
    if found.is_empty() {
        found.extend(search.several_keys());
    }
    found.iter().map(|c| written(config, c)).collect()
}

/// The keys that differ, as they stand in a configuration file.
fn written(config: &TrainConfig, changed: &TrainConfig) -> String {
    let keys: Vec<String> = config
        .diff(changed)
        .iter()
        .map(|difference| format!("{}: {}", difference.key, difference.new))
        .collect();
    keys.join(" with ")
}

struct Search<'a> {
    config: &'a TrainConfig,
    base: Base<'a>,
    attached: Option<&'a Attached>,
    rows: Option<&'a Rows>,
    budget: u64,
}

impl Search<'_> {
    fn fits(&self, candidate: &TrainConfig) -> bool {
        if candidate.lora == self.config.lora {
            return self.attached.is_some_and(|a| self.fits_with(candidate, a));
        }
        if least_trained(candidate) > self.budget {
            // Too many to lay out.
            return false;
        }
        let attached = adapter::attach(candidate, self.base.directory, self.base.decoder);
        attached.is_ok_and(|attached| self.fits_with(candidate, &attached))
    }

    fn fits_with(&self, candidate: &TrainConfig, attached: &Attached) -> bool {
        let behind = |rows: &Rows| {
            rows.workload(candidate)
                .behind_prompt(attached.prompt_tokens())
        };
        let workload = self.rows.map(behind);
        let needs = self.base.needs(candidate, attached, workload.as_ref());
        needs.total() <= self.budget
    }

    fn one_key(&self) -> Vec<TrainConfig> {
        let found = [
            self.rows.and_then(|_| self.smaller_batches(self.config)),
            self.rows.and_then(|_| self.shorter_rows(self.config)),
            Some(in_bf16(self.config)).filter(|c| self.fits(c)),
            self.in_four_bits(),
            self.lower_rank(),
            self.an_adapter(),
        ];
        found.into_iter().flatten().collect()
    }

    /// bf16 with the largest batch, or else with single rows as long as can be.
    fn several_keys(&self) -> Option<TrainConfig> {
        self.rows?;
        let half = in_bf16(self.config);
        self.smaller_batches(&half)
            .or_else(|| self.shorter_rows(&batches_of(&half, 1)))
    }

    /// Fewer rows per micro-batch, in evaluation too where that is needed.
    fn smaller_batches(&self, from: &TrainConfig) -> Option<TrainConfig> {
        let data = &from.data;
        let most = data
            .per_device_train_batch_size
            .max(data.per_device_eval_batch_size);
        // More than there are rows is as much as there are.
        let most = most.min(self.rows?.count().saturating_add(1));
        self.largest(most, |size| batches_of(from, size))
    }

    fn shorter_rows(&self, from: &TrainConfig) -> Option<TrainConfig> {
        let data = &from.data;
        // A bin of packed rows is as long as it may be; of other rows the longest counts.
        let limit = if data.packing || data.packs_evaluation() {
            data.max_length?
        } else {
            let longer = self.rows?.longest() + 1;
            data.max_length.map_or(longer, |length| length.min(longer))
        };
        let shorter = self.largest(limit, |length| {
            let mut shorter = from.clone();
            shorter.data.max_length = Some(length);
            shorter
        });
        shorter.filter(|c| c.data.max_length >= Some(SHORTEST))
    }

    /// No rank above the largest that fits, be it of lora_r or of lora_rank_pattern.
    fn lower_rank(&self) -> Option<TrainConfig> {
        if !self.config.lora.use_peft {
            return None;
        }
        self.largest(highest_rank(self.config), |most| {
            let mut lower = self.config.clone();
            let lora = &mut lower.lora;
            lora.lora_r = lora.lora_r.min(most);
            let patterns = lora.lora_rank_pattern.0.iter_mut();
            patterns.for_each(|(_, rank)| *rank = (*rank).min(most));
            lower
        })
    }

    /// The base in 4 bits, where it is not so in its files.
    fn in_four_bits(&self) -> Option<TrainConfig> {
        let quantised = self
            .base
            .files
            .is_none_or(|files| files.quantisation().is_some());
        if !self.config.lora.use_peft || self.config.model.load_in_4bit || quantised {
            return None;
        }
        let mut small = self.config.clone();
        small.model.load_in_4bit = true;
        small.model.load_in_8bit = false;
        small.model.load_in_fp8 = false;
        Some(small).filter(|c| self.fits(c))
    }

    /// LoRA at its defaults, instead of every weight.
    fn an_adapter(&self) -> Option<TrainConfig> {
        let model = &self.config.model;
        if self.config.lora.use_peft || model.random_init {
            return None;
        }
        let mut adapter = self.config.clone();
        adapter.lora.use_peft = true;
        Some(adapter).filter(|c| self.fits(c))
    }

    /// The change for the largest number from 1 to below `limit` that fits.
    fn largest(&self, limit: usize, change: impl Fn(usize) -> TrainConfig) -> Option<TrainConfig> {
        let (mut fits, mut too_large) = (0, limit);
        while too_large - fits > 1 {
            let middle = fits + (too_large - fits) / 2;
            if self.fits(&change(middle)) {
                fits = middle;
            } else {
                too_large = middle;
            }
        }
        (fits > 0).then(|| change(fits))
    }
}

fn in_bf16(config: &TrainConfig) -> TrainConfig {
    let mut half = config.clone();
    half.model.bf16 = Some(true);
    half
}

/// At most `size` rows in a batch.
fn batches_of(config: &TrainConfig, size: usize) -> TrainConfig {
    let mut smaller = config.clone();
    let data = &mut smaller.data;
    data.per_device_train_batch_size = data.per_device_train_batch_size.min(size);
    data.per_device_eval_batch_size = data.per_device_eval_batch_size.min(size);
    smaller
}

/// Lengths of the rows, without a prompt before them, from which the tokens of other batches follow.
#[derive(Debug)]
pub(super) struct Rows {
    max_length: Option<usize>,
    train: Lengths,
    eval: Option<Lengths>,
}

/// Lengths of one data set, in tokens.
#[derive(Debug)]
struct Lengths {
    /// Of what counts as one row of a batch: rows, or bins of packed ones, in their order.
    lines: Vec<usize>,
    /// The same, longest first.
    longest_lines: Vec<usize>,
    /// Of rows, longest first.
    rows: Vec<usize>,
}

impl Rows {
    pub(super) fn of(recipe: &Recipe) -> Self {
        let data = &recipe.config.data;
        let lengths = |dataset, packing| Lengths::new(data::lines(data, dataset, packing), dataset);
        Self {
            max_length: data.max_length,
            train: lengths(&recipe.dataset, data.packing),
            eval: (recipe.eval_dataset.as_ref())
                .map(|dataset| lengths(dataset, data.packs_evaluation())),
        }
    }

    fn count(&self) -> usize {
        let eval = self.eval.as_ref().map_or(0, |eval| eval.rows.len());
        self.train.rows.len().max(eval)
    }

    fn longest(&self) -> usize {
        let eval = self.eval.as_ref().and_then(|eval| eval.rows.first());
        let longest = self.train.rows.first().max(eval);
        longest.copied().unwrap_or(0)
    }

    /// The micro-batches as `config` says, each number of label rows up to the largest possible.
    fn workload(&self, config: &TrainConfig) -> Workload {
        let tokens = self.tokens(config);
        let powers = (0..usize::BITS).map(|bits| 1 << bits);
        Workload {
            tokens,
            documents: self.documents(&config.data, tokens),
            label_rows: powers.take_while(|rows| *rows <= tokens).collect(),
            mean_length: self.train.mean(),
            sizes: Vec::new(),
        }
    }

    /// No micro-batch of at most `tokens` tokens has more documents.
    fn documents(&self, data: &DataArguments, tokens: usize) -> usize {
        let of = |lengths: &Lengths, size: usize, packed: bool| match packed {
            true => lengths.documents(tokens),
            false => size,
        };
        let train = of(&self.train, data.per_device_train_batch_size, data.packing);
        let (size, packed) = (data.per_device_eval_batch_size, data.packs_evaluation());
        let eval = self.eval.as_ref().map_or(0, |eval| of(eval, size, packed));
        train.max(eval)
    }

    /// Tokens of the largest micro-batch as `config` says; of other lengths than those at hand a
    /// bound, because cutting rows also changes how they are packed and which are dropped.
    fn tokens(&self, config: &TrainConfig) -> usize {
        let data = &config.data;
        let (train_size, eval_size) = (
            data.per_device_train_batch_size,
            data.per_device_eval_batch_size,
        );
        if data.max_length == self.max_length {
            let train = first(train_size, &self.train.longest_lines);
            let eval = self.eval.as_ref().map_or(0, |eval| {
                let sums = eval.lines.chunks(eval_size.max(1)).map(|c| c.iter().sum());
                sums.max().unwrap_or(0)
            });
            return train.max(eval);
        }
        let length = data.max_length.unwrap_or(usize::MAX);
        let train = self.train.bound(train_size, length, data.packing);
        let eval = self.eval.as_ref();
        train.max(eval.map_or(0, |e| e.bound(eval_size, length, data.packs_evaluation())))
    }
}

impl Lengths {
    fn new(lines: Vec<usize>, dataset: &ferrotune_core::data::Dataset) -> Self {
        let longest_first = |mut lengths: Vec<usize>| {
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths
        };
        Self {
            longest_lines: longest_first(lines.clone()),
            lines,
            rows: longest_first(dataset.lengths()),
        }
    }

    fn mean(&self) -> f64 {
        self.rows.iter().sum::<usize>() as f64 / self.rows.len().max(1) as f64
    }

    /// As many rows as `tokens` tokens can be of.
    fn documents(&self, tokens: usize) -> usize {
        let shortest = self.rows.last().copied().unwrap_or(1).max(1);
        (tokens / shortest).clamp(1, self.rows.len().max(1))
    }

    /// No batch of `size` lines has more tokens when no row or bin is longer than `length`.
    fn bound(&self, size: usize, length: usize, packing: bool) -> usize {
        let rows = self.rows.iter();
        if packing {
            rows.sum::<usize>().min(size.saturating_mul(length))
        } else {
            rows.take(size).map(|row| (*row).min(length)).sum()
        }
    }
}

fn first(count: usize, lengths: &[usize]) -> usize {
    lengths.iter().take(count).sum()
}
