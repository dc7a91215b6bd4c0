use super::chat::{ModelArgs, at_least_one};
use super::exact_match::{exact_match, questions, read_rows};
use super::{Failure, Outcome, print_line, print_note};
use ferrotune::TextModel;
use ferrotune::core::data::{Dataset, PackedBatch, PrepareOptions, PrepareReport, Row};
use ferrotune::core::io::{FileDType, TensorData, write_safetensors};
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::kernels::linear_cross_entropy::Sums;
use ferrotune::recipe::{classes, row_files};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// TRL's `max_length`, for models whose context is not shorter.
const MAX_LENGTH: usize = 1024;

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows as for training: a file, a directory with files of the split, or a name on the hub
    #[arg(long)]
    data: String,
    /// Which split of a directory or of a data set on the hub
    #[arg(long, value_name = "NAME", default_value = "test")]
    dataset_test_split: String,
    #[command(flatten)]
    rows: RowArgs,
    /// Rows per batch
    #[arg(long, default_value = "8", value_parser = at_least_one)]
    batch_size: NonZeroUsize,
    /// Also answer every prompt and count the answers that are exactly the completion
    #[arg(long)]
    exact_match: bool,
    /// Longest answer, in tokens
    #[arg(long, default_value = "128", value_parser = at_least_one)]
    max_new_tokens: NonZeroUsize,
    /// Only the first N rows
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    limit: Option<NonZeroUsize>,
    /// Write token ids and logits of the first row to this safetensors file
    #[arg(long)]
    logits_file: Option<PathBuf>,
}

/// How rows become tokens with labels: the keys of training.
#[derive(Debug, clap::Args)]
struct RowArgs {
    /// Longest row in tokens, longer ones lose their end [default: 1024, or the model's context where
    /// that is shorter]
    #[arg(long, value_parser = at_least_one)]
    max_length: Option<NonZeroUsize>,
    /// Column of plain text
    #[arg(long, value_name = "NAME", default_value = "text")]
    dataset_text_field: String,
    /// Loss on completions only; unset means yes for rows of prompt and completion
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    completion_only_loss: Option<bool>,
    /// Loss on what the assistant says only
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    assistant_only_loss: Option<bool>,
}

impl RowArgs {
    /// Tokens at which rows are cut.
    fn max_length(&self, context: usize) -> usize {
        self.max_length
            .map_or(MAX_LENGTH.min(context), NonZeroUsize::get)
    }

    fn options(&self, context: usize) -> PrepareOptions {
        PrepareOptions {
            dataset_text_field: self.dataset_text_field.clone(),
            max_length: Some(self.max_length(context)),
            completion_only_loss: self.completion_only_loss,
            assistant_only_loss: self.assistant_only_loss.unwrap_or(false),
            ..PrepareOptions::default()
        }
    }
}

pub(super) fn run(args: &Args) -> Outcome {
    let limit = args.limit.map_or(usize::MAX, NonZeroUsize::get);
    let files = row_files(&args.data, &args.dataset_test_split, "data")?;
    let mut rows = read_rows(&files, &args.rows.dataset_text_field, limit)?;
    if args.exact_match {
        questions(rows.clone())?;
    }
    if args.logits_file.is_some() && args.model.is_several() {
        let message = "--logits-file holds the logits of one adapter; give one --adapter";
        return Err(Failure::Usage(message.into()));
    }
    let mut model = args.model.load()?;
    let adapters: Vec<String> = model.adapters().map(str::to_owned).collect();
    for adapter in &adapters {
        model.set_adapter(adapter)?;
        let rows = match args.model.is_several() {
            true => rows.clone(),
            false => std::mem::take(&mut rows),
        };
        let mut result = evaluate(args, &model, rows)?;
        if args.model.is_several() {
            result.insert("adapter", json!(adapter));
        }
        print_line(serde_json::to_string(&result).map_err(|e| Failure::Usage(e.to_string()))?)?;
    }
    Ok(ExitCode::Done)
}

/// What is found of the rows with the active adapter.
fn evaluate(
    args: &Args,
    model: &TextModel,
    rows: Vec<Row>,
) -> Result<BTreeMap<&'static str, Value>, Failure> {
    let asked = args.exact_match.then(|| questions(rows.clone()));
    let asked = asked.transpose()?;
    let dataset = prepare(args, model, rows)?;
    let mut result = BTreeMap::new();
    if let Some(questions) = asked {
        let answered = exact_match(model, questions, args.max_new_tokens.get())?;
        result.insert("eval_exact_match", json!(answered.score()));
        result.insert("eval_prompts", json!(answered.questions.len()));
    }
    loss(model, &dataset, args.batch_size.get(), &mut result)?;
    report_rows(args, model, &dataset.report, &mut result);
    if let Some(path) = &args.logits_file {
        write_logits(path, model, &dataset)?;
    }
    Ok(result)
}

/// The rows as training would see them, each of which the model can take.
fn prepare(args: &Args, model: &TextModel, rows: Vec<Row>) -> Result<Dataset> {
    let path = Path::new(&args.data);
    if rows.is_empty() {
        let message = "no rows; expected one JSON object per line";
        return Err(Error::data(path, None, message));
    }
    let context = model.model.config().max_position_embeddings;
    let options = PrepareOptions {
        vocab_size: Some(model.model.config().vocab_size),
        classes: classes(&model.base, model.model.config())?,
        ..args.rows.options(context)
    };
    let dataset = Dataset::from_rows(rows, model.tokenizer(), &options)?;
    let too_long = dataset
        .examples
        .lengths()
        .filter(|length| *length > context);
    let (count, longest) = (too_long.count(), dataset.report.longest);
    if count > 0 {
        return Err(Error::config(
            "max_length",
            format!(
                "leaves {count} of the {} rows of {} longer than the context of {}, {context} tokens \
                 (the longest has {longest}); set --max-length {context} or leave it out",
                dataset.report.rows,
                path.display(),
                model.base.display()
            ),
        ));
    }
    dataset
        .examples
        .for_each(|_, example| model.check_vocabulary(&example.input_ids))?;
    Ok(dataset)
}

/// Adds what was not evaluated as it stands in the file, and says so on standard error.
fn report_rows(
    args: &Args,
    model: &TextModel,
    report: &PrepareReport,
    result: &mut BTreeMap<&'static str, Value>,
) {
    result.insert("eval_dropped_rows", json!(report.dropped_rows));
    result.insert("eval_truncated_rows", json!(report.truncated_rows));
    result.insert("eval_tokens_lost", json!(report.tokens_lost));
    let of_all = format!("of the {} rows of {}", report.rows, args.data);
    if report.truncated_rows > 0 {
        let context = model.model.config().max_position_embeddings;
        print_note(&format!(
            "{} {of_all} were cut to {} tokens (--max-length) and lost {} tokens",
            report.truncated_rows,
            args.rows.max_length(context),
            report.tokens_lost
        ));
    }
    if let Some((path, line)) = report.dropped_lines.first() {
        print_note(&format!(
            "{} {of_all} were left out of the loss, because no token of them is predicted (the first \
             is {}:{line})",
            report.dropped_rows,
            path.display()
        ));
    }
}

/// Adds the loss and its relatives, means over the tokens that are predicted.
fn loss(
    model: &TextModel,
    dataset: &Dataset,
    batch_size: usize,
    result: &mut BTreeMap<&'static str, Value>,
) -> Result<()> {
    let mut sums = Sums::default();
    let examples = dataset.examples.to_vec()?;
    for rows in examples.chunks(batch_size) {
        let batch = PackedBatch::pack(rows.iter().enumerate().map(|(i, e)| (i as u64, e)));
        sums += model.loss(&batch)?;
    }
    // Every example has a token that is predicted, so the count is not 0.
    let count = sums.count as f64;
    let mean = sums.loss / count;
    if !mean.is_finite() {
        let message = format!(
            "the loss over {} tokens is {mean}; the weights or the adapter hold NaN or infinity",
            sums.count
        );
        return Err(Error::Numeric { message });
    }
    result.insert("eval_loss", json!(mean));
    if model.model.config().classifier.is_none() {
        result.insert("eval_perplexity", json!(mean.exp()));
    }
    result.insert("eval_entropy", json!(sums.entropy / count));
    result.insert(
        "eval_mean_token_accuracy",
        json!(sums.correct as f64 / count),
    );
    result.insert("eval_num_tokens", json!(sums.count));
    result.insert("eval_samples", json!(dataset.examples.len()));
    Ok(())
}

/// `input_ids` `[1, T]` and `logits` `[1, T, V]`, for comparison with other software.
fn write_logits(path: &Path, model: &TextModel, dataset: &Dataset) -> Result<()> {
    if dataset.examples.is_empty() {
        return Err(Error::data(path, None, "no row to take logits of"));
    }
    let example = dataset.examples.get(0)?;
    let batch = PackedBatch::pack([(0, &example)]);
    let logits = model.logits(&batch)?;
    let (values, tokens, vocab) = (logits.to_f32_vec(), batch.tokens(), logits.cols());
    let ids: Vec<u8> = batch
        .input_ids
        .iter()
        .flat_map(|id| i64::from(*id).to_le_bytes())
        .collect();
    let ids = TensorData {
        dtype: FileDType::I64,
        shape: vec![1, tokens],
        bytes: Cow::Owned(ids),
    };
    let logits = TensorData::from_f32(&values, [1, tokens, vocab]);
    let tensors = BTreeMap::from([("input_ids".to_owned(), ids), ("logits".to_owned(), logits)]);
    write_safetensors(path, &tensors, &BTreeMap::new())
}
