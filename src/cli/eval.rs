use super::chat::ModelArgs;
use super::{Failure, Outcome};
use ferrotune::TextModel;
use ferrotune::core::data::jsonl::{JsonLines, parse_object};
use ferrotune::core::data::{Dataset, Message, PackedBatch, PrepareOptions, Record};
use ferrotune::core::io::{FileDType, TensorData, write_safetensors};
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::generate::GenerateOptions;
use ferrotune::kernels::linear_cross_entropy::Sums;
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON Lines as for training
    #[arg(long)]
    data: PathBuf,
    /// Longest row in tokens, longer ones lose their end
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// Rows per batch
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Also answer every prompt and count the answers that are exactly the completion
    #[arg(long)]
    exact_match: bool,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Only the first N rows
    #[arg(long)]
    limit: Option<usize>,
    /// Write token ids and logits of the first row to this safetensors file
    #[arg(long)]
    logits_file: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Outcome {
    let chat = args.model.load()?;
    let mut result = BTreeMap::new();
    let dataset = loss(args, &chat, &mut result)?;
    if args.exact_match {
        let questions = questions(&args.data, args.limit)?;
        let answered = exact_match(&chat, &questions, args.max_new_tokens)?;
        result.insert("eval_exact_match", json!(answered.score()));
        result.insert("eval_prompts", json!(answered.questions.len()));
    }
    if let Some(path) = &args.logits_file {
        write_logits(path, &chat, &dataset)?;
    }
    println!(
        "{}",
        serde_json::to_string(&result).map_err(|e| Failure::Usage(e.to_string()))?
    );
    Ok(ExitCode::Done)
}

fn loss(
    args: &Args,
    chat: &TextModel,
    result: &mut BTreeMap<&str, serde_json::Value>,
) -> Result<Dataset> {
    let options = PrepareOptions {
        max_length: Some(args.max_length),
        ..PrepareOptions::default()
    };
    let mut dataset = Dataset::load(std::slice::from_ref(&args.data), &chat.tokenizer, &options)?;
    if let Some(limit) = args.limit {
        dataset.examples.truncate(limit);
    }
    let mut sums = Sums::default();
    for rows in dataset.examples.chunks(args.batch_size.max(1)) {
        let batch = PackedBatch::pack(rows.iter().enumerate().map(|(i, e)| (i as u64, e)));
        sums += chat.model.loss(chat.pass(), &chat.params, &batch)?;
    }
    let count = sums.count.max(1) as f64;
    let mean = sums.loss / count;
    result.insert("eval_loss", json!(mean));
    result.insert("eval_perplexity", json!(mean.exp()));
    result.insert("eval_entropy", json!(sums.entropy / count));
    result.insert(
        "eval_mean_token_accuracy",
        json!(sums.correct as f64 / count),
    );
    result.insert("eval_num_tokens", json!(sums.count));
    result.insert("eval_samples", json!(dataset.examples.len()));
    Ok(dataset)
}

/// A prompt and the answer it should get.
pub(super) struct Question {
    pub(super) prompt: Vec<Message>,
    pub(super) expected: String,
}

/// Questions with what the model answered.
pub(super) struct Answered {
    pub(super) questions: Vec<Question>,
    pub(super) answers: Vec<String>,
}

impl Answered {
    /// Share of answers that are exactly what was expected, spaces around aside.
    pub(super) fn score(&self) -> f64 {
        let right = |(q, a): &(&Question, &String)| q.expected.trim() == a.trim();
        let right = self
            .questions
            .iter()
            .zip(&self.answers)
            .filter(right)
            .count();
        right as f64 / self.questions.len().max(1) as f64
    }
}

/// The prompts of a data set with their completions: the last message, or the completion.
pub(super) fn questions(path: &Path, limit: Option<usize>) -> Result<Vec<Question>> {
    let mut questions = Vec::new();
    for line in JsonLines::open(path)? {
        let line = line?;
        if limit.is_some_and(|limit| questions.len() >= limit) {
            break;
        }
        let row = parse_object(path, &line)?;
        let record =
            Record::from_row(&row, "text").map_err(|m| Error::data(path, line.number, m))?;
        let question = question(record).ok_or_else(|| {
            Error::data(path, line.number, "has no prompt and completion; exact match needs `prompt` and `completion`, or `messages` that end with the assistant")
        })?;
        questions.push(question);
    }
    Ok(questions)
}

fn question(record: Record) -> Option<Question> {
    let text = |message: &Message| message.content()?.as_str().map(str::to_owned);
    match record {
        Record::Messages { mut messages, .. } => {
            let last = messages.pop().filter(|m| m.role() == "assistant")?;
            Some(Question {
                prompt: messages,
                expected: text(&last)?,
            })
        }
        Record::PromptCompletionMessages {
            prompt, completion, ..
        } => Some(Question {
            prompt,
            expected: text(completion.first()?)?,
        }),
        Record::PromptCompletion { prompt, completion } => Some(Question {
            prompt: vec![Message::new("user", prompt)],
            expected: completion,
        }),
        Record::Text(_) => None,
    }
}

/// Answers every question, greedily.
pub(super) fn exact_match(
    chat: &TextModel,
    questions: &[Question],
    max_new_tokens: usize,
) -> Result<Answered> {
    let prompts = questions
        .iter()
        .map(|q| chat.encode(&q.prompt))
        .collect::<Result<Vec<_>>>()?;
    let greedy = GenerateOptions {
        max_new_tokens,
        batch_size: 64,
        ..GenerateOptions::default()
    };
    let answers = chat.answer(&prompts, &greedy)?;
    let questions = questions.iter().map(|q| Question {
        prompt: q.prompt.clone(),
        expected: q.expected.clone(),
    });
    Ok(Answered {
        questions: questions.collect(),
        answers,
    })
}

/// `input_ids` `[1, T]` and `logits` `[1, T, V]`, for comparison with other software.
fn write_logits(path: &Path, chat: &TextModel, dataset: &Dataset) -> Result<()> {
    let Some(example) = dataset.examples.first() else {
        return Err(Error::data(path, None, "no row to take logits of"));
    };
    let batch = PackedBatch::pack([(0, example)]);
    let logits = chat.model.logits(chat.pass(), &chat.params, &batch)?;
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
