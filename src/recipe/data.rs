//! Data of a run: files to examples, examples to the micro-batches of each step.

mod arrange;
mod files;
mod workload;

#[cfg(feature = "hub")]
pub(crate) use files::is_of_split;

pub(super) use workload::workload;

use super::classifier::classes;
use crate::hub;
use ferrotune_core::config::{
    DataArguments, PackingStrategy, SamplingStrategy, TrainConfig, TruncationMode,
};
use ferrotune_core::data::{
    BatchPlan, ChatTemplate, Classes, Dataset, EpochPlan, Examples, Order, PackedBatch,
    PrepareOptions, Record, Row, Tokenizer, pack_bfd,
};
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::process_group::Place;
use ferrotune_core::trainer::StepData;
use ferrotune_core::{Error, Result, suggest};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Training rows, and rows held out of them.
pub(super) type Prepared = (Dataset, Option<Dataset>);

/// What preparing rows needs to know of the model.
#[derive(Debug, Default)]
pub(super) struct OfModel {
    /// Token ids that it has rows for; `None` for the tokenizer's.
    vocab_size: Option<usize>,
    /// Of a classifier.
    classes: Option<Classes>,
}

impl OfModel {
    /// Of the model `decoder` over the base in a directory.
    pub(super) fn of(base: &Path, decoder: &DecoderConfig) -> Result<Self> {
        Ok(Self {
            vocab_size: Some(decoder.vocab_size),
            classes: classes(base, decoder)?,
        })
    }
}

/// The tokenizer of the base, with the configured chat template.
pub(super) fn tokenizer(config: &TrainConfig, base: &Path) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_dir(base)?;
    if let Some(path) = &config.data.chat_template_path {
        if Path::new(path).is_dir() {
            return Err(template_directory(path));
        }
        let path = Path::new(path);
        ChatTemplate::read_source(path)
            .and_then(|source| tokenizer.set_chat_template(&source))
            .map_err(|error| error.in_template_file(path))?;
    }
    if let Some(pad) = &config.data.pad_token {
        tokenizer.require_token("pad_token", pad)?;
    }
    Ok(tokenizer)
}

/// TRL takes over the tokenizer of such a directory, tokens and all; here the tokenizer is the base's.
fn template_directory(path: &str) -> Error {
    let file = Path::new(path).join("chat_template.jinja");
    let instead = match file.is_file() {
        true => format!("give {}", file.display()),
        false => "give a file with the `chat_template` of its tokenizer_config.json".into(),
    };
    let message =
        format!("`{path}` is a directory; expected a file with a Jinja template: {instead}");
    Error::config("chat_template_path", message)
}

/// The names of `dataset_name`, those on the hub replaced by where their files are.
fn local(config: &TrainConfig) -> Result<Vec<String>> {
    let data = &config.data;
    let splits = [
        data.dataset_train_split.clone(),
        data.dataset_test_split.clone(),
    ];
    let local = |name: &String| {
        let path = hub::rows(name, &splits, "dataset_name")?;
        Ok(path.display().to_string())
    };
    data.dataset_name.iter().map(local).collect()
}

/// The files of rows that `name` stands for: itself, or those of `split` in a directory or on the hub.
///
/// # Errors
/// [`Error::Config`] about `key` if there are none; what fetching them finds.
pub fn row_files(name: &str, split: &str, key: &str) -> Result<Vec<PathBuf>> {
    let path = hub::rows(name, &[split.to_owned()], key)?;
    // A pipe too.
    if path.exists() && !path.is_dir() {
        return Ok(vec![path]);
    }
    let files = files::named(&[path.display().to_string()], split, key)?;
    Ok(files.concat())
}

/// The rows of a run: what `training` gives, and those for evaluation, if there are any.
pub(super) fn all(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    of_model: &OfModel,
    training: impl FnOnce(&TrainConfig, &Tokenizer, &OfModel) -> Result<Prepared>,
) -> Result<Prepared> {
    let (dataset, held_out) = training(config, tokenizer, of_model)?;
    let eval_dataset = evaluation(config, tokenizer, of_model, held_out)?;
    check_renamed(&dataset, eval_dataset.as_ref())?;
    Ok((dataset, eval_dataset))
}

/// A column that is to be renamed and is nowhere there is misspelt, or of other rows.
fn check_renamed(dataset: &Dataset, eval_dataset: Option<&Dataset>) -> Result<()> {
    let report = &dataset.report;
    let is_missing = |name: &&String| {
        eval_dataset.is_none_or(|eval| {
            // Those that were held out are of the same files.
            eval.file_ends.is_empty() || eval.report.missing_columns.contains(*name)
        })
    };
    let Some(name) = report.missing_columns.iter().find(is_missing) else {
        return Ok(());
    };
    let unused = report.unused_columns.values().flatten();
    let unused: BTreeSet<&str> = unused.map(String::as_str).collect();
    let hint = suggest::did_you_mean(name, unused);
    let message = format!("renames `{name}`, and no row has a column of that name{hint}");
    Err(Error::config("dataset_columns", message))
}

/// The training rows, prepared, and those of them that are held out for evaluation.
pub(super) fn training(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    of_model: &OfModel,
) -> Result<Prepared> {
    let data = &config.data;
    let mut files = Vec::new();
    let mut weights = Vec::new();
    let names = files::named(&local(config)?, &data.dataset_train_split, "dataset_name")?;
    let plain = data.train_file.iter().map(|f| vec![PathBuf::from(f)]);
    for (i, named) in names.into_iter().chain(plain).enumerate() {
        let weight = data.dataset_weights.get(i).copied().unwrap_or(1.0);
        weights.extend(named.iter().map(|_| weight));
        files.extend(named);
    }
    if files.is_empty() {
        return Err(Error::config(
            "dataset_name",
            "is missing; expected a file of rows, a directory of them, or train_file",
        ));
    }
    files::require_files(&files)?;
    let options = options(config, data.packing, of_model);
    let dataset = load(config, &files, tokenizer, &options)?;
    arrange::training(config, dataset, &weights)
}

/// Training rows that do not come from files, prepared.
pub(super) fn training_rows(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    of_model: &OfModel,
    rows: impl IntoIterator<Item = Record>,
) -> Result<Prepared> {
    let name = config.data.dataset_name.first();
    let path: Arc<Path> = Arc::from(Path::new(name.map_or("rows", String::as_str)));
    let rows = rows.into_iter().zip(1..).map(|(record, line)| Row {
        record,
        path: Arc::clone(&path),
        line,
        label: None,
    });
    let options = options(config, config.data.packing, of_model);
    let dataset = Dataset::from_rows(rows.collect(), tokenizer, &options)?;
    arrange::training(config, dataset, &[])
}

/// Rows prepared and cut as a run would for training.
///
/// # Errors
/// What [`Dataset::from_rows`] finds, and a packing that does not fit the rows.
pub fn prepare_rows(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    rows: impl IntoIterator<Item = Record>,
) -> Result<Dataset> {
    training_rows(config, tokenizer, &OfModel::default(), rows).map(|(dataset, _)| dataset)
}

/// The evaluation rows, if there are any: of their own files, else those held out.
fn evaluation(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    of_model: &OfModel,
    held_out: Option<Dataset>,
) -> Result<Option<Dataset>> {
    let data = &config.data;
    let mut files: Vec<PathBuf> = data.eval_file.iter().map(PathBuf::from).collect();
    if files.is_empty() && held_out.is_none() {
        let mut directories = local(config)?;
        directories.retain(|name| Path::new(name).is_dir());
        files = files::named(&directories, &data.dataset_test_split, "dataset_test_split")
            .unwrap_or_default()
            .concat();
    }
    if files.is_empty() {
        return Ok(held_out);
    }
    let packing = data.packs_evaluation();
    files::require_files(&files)?;
    let options = options(config, packing, of_model);
    let mut dataset = load(config, &files, tokenizer, &options)?;
    arrange::cut(config, packing, &mut dataset)?;
    Ok(Some(dataset))
}

/// The rows of files, prepared: in memory, or where they were prepared before.
fn load(
    config: &TrainConfig,
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    options: &PrepareOptions,
) -> Result<Dataset> {
    match &config.data.dataset_cache_dir {
        Some(directory) => Dataset::load_cached(files, tokenizer, options, Path::new(directory)),
        None => Dataset::load(files, tokenizer, options),
    }
}

fn options(config: &TrainConfig, packing: bool, of_model: &OfModel) -> PrepareOptions {
    let data = &config.data;
    let cut_later = packing && data.packing_strategy != PackingStrategy::Bfd;
    PrepareOptions {
        dataset_text_field: data.dataset_text_field.clone(),
        max_length: if cut_later { None } else { data.max_length },
        // As in TRL.
        truncation_mode: match packing {
            true => TruncationMode::KeepStart,
            false => data.truncation_mode,
        },
        completion_only_loss: data.completion_only_loss,
        assistant_only_loss: data.assistant_only_loss,
        eos_token: data.eos_token.clone(),
        dataset_columns: data.dataset_columns.clone(),
        bad_rows: data.bad_rows,
        keep_unlabelled: packing || data.max_length.is_none(),
        vocab_size: of_model.vocab_size,
        classes: of_model.classes.clone(),
        ..PrepareOptions::default()
    }
}

/// Rows that the model cannot read are an error before the first step, not in it.
pub(super) fn check_fit(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    rows: &Prepared,
    prompt_tokens: usize,
    decoder: &DecoderConfig,
    base: &Path,
) -> Result<()> {
    let (dataset, eval_dataset) = rows;
    for rows in std::iter::once(dataset).chain(eval_dataset) {
        check_fits_context(config, rows, prompt_tokens, decoder, base)?;
        check_fits_vocabulary(tokenizer, rows, decoder, base)?;
    }
    Ok(())
}

/// No row may be longer than the model's context.
fn check_fits_context(
    config: &TrainConfig,
    dataset: &Dataset,
    prompt_tokens: usize,
    decoder: &DecoderConfig,
    base: &Path,
) -> Result<()> {
    let (longest, context) = (dataset.report.longest, decoder.max_position_embeddings);
    if longest + prompt_tokens <= context {
        return Ok(());
    }
    let prompt = match prompt_tokens {
        0 => String::new(),
        tokens => format!(" behind {tokens} virtual ones"),
    };
    let fits = context.saturating_sub(prompt_tokens);
    let max_length = config
        .data
        .max_length
        .map_or("null".into(), |v| v.to_string());
    Err(Error::config(
        "max_length",
        format!(
            "is {max_length}, and the longest row has {longest} tokens{prompt}, but the context of {} is {context} \
             (max_position_embeddings); set max_length: {fits} or scale the model's rope",
            base.display()
        ),
    ))
}

/// The embedding must have a row for every token.
fn check_fits_vocabulary(
    tokenizer: &Tokenizer,
    dataset: &Dataset,
    decoder: &DecoderConfig,
    base: &Path,
) -> Result<()> {
    let mut largest = 0;
    dataset.examples.for_each(|_, example| {
        let labels = example.labels.iter().filter_map(|&l| u32::try_from(l).ok());
        let ids = example.input_ids.iter().copied().chain(labels);
        largest = ids.fold(largest, u32::max);
        Ok(())
    })?;
    tokenizer.check_fits(&[largest], decoder.vocab_size, &base.join("config.json"))
}

/// Micro-batches of every step, as a function of (seed, epoch).
#[derive(Debug)]
pub struct EpochData<'a> {
    examples: &'a Examples,
    lengths: Vec<usize>,
    bins: Vec<Vec<usize>>,
    plan: BatchPlan,
    hidden_size: usize,
    rank: usize,
    steps_per_epoch: u64,
    /// The epoch whose order is at hand.
    current: Option<(u64, EpochPlan)>,
}

impl<'a> EpochData<'a> {
    /// The data of the rank at `place`, for a model as wide as `hidden_size`.
    #[must_use]
    pub fn new(
        config: &TrainConfig,
        dataset: &'a Dataset,
        hidden_size: usize,
        place: Place,
    ) -> Self {
        let data = &config.data;
        let plan = BatchPlan {
            per_device_train_batch_size: data.per_device_train_batch_size,
            gradient_accumulation_steps: config.optimizer.gradient_accumulation_steps,
            world_size: place.world_size,
            order: match data.train_sampling_strategy {
                SamplingStrategy::Random => Order::Random,
                SamplingStrategy::Sequential => Order::Sequential,
            },
            seed: config.runtime.data_seed(),
        };
        let bins = bins(data, dataset, data.packing);
        let steps_per_epoch = EpochPlan::packed(&bins, |_| 0, plan, 0).steps() as u64;
        Self {
            examples: &dataset.examples,
            lengths: dataset.lengths(),
            bins,
            plan,
            hidden_size,
            rank: place.rank,
            steps_per_epoch,
            current: None,
        }
    }

    /// Optimizer steps of one epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }
}

impl StepData for EpochData<'_> {
    fn step(&mut self, step: u64) -> Result<Vec<PackedBatch>> {
        let steps = self.steps_per_epoch.max(1);
        let epoch = step / steps;
        if self.current.as_ref().is_none_or(|(e, _)| *e != epoch) {
            let cost = |row: usize| cost(self.lengths[row], self.hidden_size);
            let plan = EpochPlan::packed(&self.bins, cost, self.plan, epoch);
            self.current = Some((epoch, plan));
        }
        let micro_batches = self
            .current
            .as_ref()
            .map(|(_, plan)| plan.step((step % steps) as usize, self.rank));
        let micro_batches = micro_batches.unwrap_or_default();
        let pack = |rows: &ferrotune_core::data::MicroBatch| pack(self.examples, rows.documents());
        micro_batches.iter().map(pack).collect()
    }
}

/// Documents, each with its id in the step, in one row.
fn pack(examples: &Examples, documents: impl Iterator<Item = (u64, usize)>) -> Result<PackedBatch> {
    let documents: Result<Vec<_>> = documents
        .map(|(id, row)| Ok((id, examples.get(row)?)))
        .collect();
    Ok(PackedBatch::pack(documents?.iter().map(|(id, e)| (*id, e))))
}

/// What a document of `tokens` costs, in units that only compare: a layer's products take about
/// `24 hidden^2` FLOPs a token, and its causal attention `2 hidden` a token and token before it.
fn cost(tokens: usize, hidden_size: usize) -> u64 {
    let (tokens, hidden_size) = (tokens as u64, hidden_size as u64);
    tokens * (12 * hidden_size + tokens)
}

/// Batches of `per_device_eval_batch_size` rows (or bins) in the order of the file.
///
/// # Errors
/// [`Error::Read`] if they lie in a file that cannot be read.
pub fn eval_batches(config: &TrainConfig, dataset: &Dataset) -> Result<Vec<PackedBatch>> {
    let bins = bins(&config.data, dataset, config.data.packs_evaluation());
    bins.chunks(config.data.per_device_eval_batch_size.max(1))
        .map(|bins| {
            let rows = bins.iter().flatten();
            pack(&dataset.examples, rows.map(|&row| (row as u64, row)))
        })
        .collect()
}

/// Rows that share a line of a batch: one each, or bins of `max_length` tokens.
fn bins(data: &DataArguments, dataset: &Dataset, packing: bool) -> Vec<Vec<usize>> {
    match data.max_length {
        // Wrapped blocks are full already.
        Some(max_length) if packing && data.packing_strategy != PackingStrategy::Wrapped => {
            pack_bfd(&dataset.lengths(), max_length)
        }
        _ => (0..dataset.examples.len()).map(|i| vec![i]).collect(),
    }
}

/// Tokens of each line of a batch, in the order of the file: a row, or a bin of packed rows.
pub(super) fn lines(data: &DataArguments, dataset: &Dataset, packing: bool) -> Vec<usize> {
    line_tokens(&bins(data, dataset, packing), &dataset.lengths())
}

fn line_tokens(bins: &[Vec<usize>], lengths: &[usize]) -> Vec<usize> {
    let tokens = |bin: &Vec<usize>| bin.iter().map(|&i| lengths[i]).sum();
    bins.iter().map(tokens).collect()
}
