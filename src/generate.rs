//! Text from a model: batched decoding with a key-value cache, greedy or sampled.

use candle_core::{Device, Tensor as CandleTensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use ferrotune_core::model::{KvCache, MemberDocuments, Model, Pass};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, rng};

/// Below this, logits divided by the temperature leave the range of f32, and the most likely token
/// would be drawn anyway.
pub const MIN_TEMPERATURE: f64 = 1e-5;

/// How the next token is chosen, and when to stop. Names are Transformers'.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// 0 always takes the most likely token; so does anything below [`MIN_TEMPERATURE`].
    pub temperature: f64,
    /// Only the k most likely tokens; `None` keeps all.
    pub top_k: Option<usize>,
    /// Only the smallest set of tokens with this much probability; `None` keeps all.
    pub top_p: Option<f64>,
    /// Seed of the draws; each prompt of a voice has a stream of its own.
    pub seed: u64,
    /// Tokens that end an answer, and are not part of it; empty for those of the tokenizer.
    pub stop_ids: Vec<u32>,
    /// Prompts that run together.
    pub batch_size: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            temperature: 0.0,
            top_k: None,
            top_p: None,
            seed: 42,
            stop_ids: Vec::new(),
            batch_size: 32,
        }
    }
}

impl GenerateOptions {
    fn sampling(&self) -> Sampling {
        let temperature = self.temperature;
        match (self.top_k, self.top_p) {
            _ if temperature < MIN_TEMPERATURE => Sampling::ArgMax,
            (None, None) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        }
    }
}

/// Who answers: a model with one adapter or none, or one of several adapters over a base.
#[derive(Clone, Copy, Debug)]
pub struct Voice<'a> {
    /// Its number among several adapters; `None` for the model as it was loaded.
    pub adapter: Option<usize>,
    /// Values of the adapter.
    pub params: &'a FlatBuffer,
    /// Tokens that end an answer, where the options name none.
    pub stop_ids: &'a [u32],
}

/// Token ids to go on from, and who is to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Index among the voices.
    pub voice: usize,
    /// At least one.
    pub ids: Vec<u32>,
}

/// One answer in progress.
struct Answer {
    /// Index of its question.
    question: usize,
    voice: usize,
    cache: KvCache,
    /// Tokens to feed next.
    next: Vec<u32>,
    sampler: LogitsProcessor,
}

/// The answer to each question, in order. An answer does not depend on what it is batched with, nor a voice's answers
/// on the other voices. Several voices are all adapters of [`Model::load_together`], or its base.
///
/// # Errors
/// [`Error::Config`] if a prompt is empty or longer than the model's context.
pub fn generate(
    model: &Model,
    voices: &[Voice<'_>],
    pass: Pass<'_>,
    questions: &[Question],
    options: &GenerateOptions,
) -> Result<Vec<Vec<u32>>> {
    let mut waiting = Vec::with_capacity(questions.len());
    let mut asked = vec![0; voices.len()];
    for (index, question) in questions.iter().enumerate() {
        capacity(model, index, &question.ids, options)?;
        let nth = &mut asked[question.voice];
        waiting.push((index, *nth));
        *nth += 1;
    }
    let mut answers = vec![Vec::new(); questions.len()];
    if options.max_new_tokens == 0 {
        return Ok(answers);
    }
    waiting.reverse();
    let mut running: Vec<Answer> = Vec::new();
    while !(waiting.is_empty() && running.is_empty()) {
        while running.len() < options.batch_size.max(1) {
            let Some((index, nth)) = waiting.pop() else {
                break;
            };
            running.push(start(
                model,
                pass,
                (index, nth),
                &questions[index],
                options,
            )?);
        }
        // The documents of a voice are rows of their own.
        running.sort_by_key(|answer| answer.voice);
        let logits = step(model, voices, pass, &mut running)?;
        let mut still = Vec::with_capacity(running.len());
        for (row, mut answer) in running.into_iter().enumerate() {
            let token = choose(&logits, row, &mut answer.sampler)?;
            let given = &mut answers[answer.question];
            let stop_ids = match options.stop_ids.as_slice() {
                [] => voices[answer.voice].stop_ids,
                stop_ids => stop_ids,
            };
            if stop_ids.contains(&token) {
                continue;
            }
            given.push(token);
            if given.len() < options.max_new_tokens {
                answer.next = vec![token];
                still.push(answer);
            }
        }
        running = still;
    }
    Ok(answers)
}

/// Tokens of a prompt and its longest answer together.
fn capacity(
    model: &Model,
    index: usize,
    prompt: &[u32],
    options: &GenerateOptions,
) -> Result<usize> {
    if prompt.is_empty() {
        return Err(Error::config(
            "prompt",
            format!("prompt {index} has no tokens; there is nothing to go on from"),
        ));
    }
    let context = model.config().max_position_embeddings;
    let capacity = prompt.len().saturating_add(options.max_new_tokens);
    if capacity > context {
        return Err(Error::config(
            "max_new_tokens",
            format!(
                "prompt {index} has {} tokens and may get {}; the model's context is {context}. \
                 Shorten the prompt or lower max_new_tokens",
                prompt.len(),
                options.max_new_tokens
            ),
        ));
    }
    Ok(capacity)
}

/// Begins the answer to the question at `index`, the `nth` of its voice.
fn start(
    model: &Model,
    pass: Pass<'_>,
    (index, nth): (usize, u64),
    question: &Question,
    options: &GenerateOptions,
) -> Result<Answer> {
    let capacity = capacity(model, index, &question.ids, options)?;
    let seed = rng::mix(rng::key_for(options.seed, "generate"), nth);
    Ok(Answer {
        question: index,
        voice: question.voice,
        cache: KvCache::new(model, pass.dtype, capacity),
        next: question.ids.clone(),
        sampler: LogitsProcessor::from_sampling(seed, options.sampling()),
    })
}

fn step(
    model: &Model,
    voices: &[Voice<'_>],
    pass: Pass<'_>,
    running: &mut [Answer],
) -> Result<Tensor> {
    let of = |index: usize| running.iter().filter(|a| a.voice == index).count();
    let members: Vec<MemberDocuments<'_>> = (voices.iter().enumerate())
        .map(|(index, voice)| MemberDocuments {
            number: voice.adapter,
            params: voice.params,
            documents: of(index),
        })
        .filter(|member| member.documents > 0)
        .collect();
    let (mut caches, mut tokens) = (Vec::new(), Vec::new());
    for answer in running {
        caches.push(&mut answer.cache);
        tokens.push(answer.next.as_slice());
    }
    match members.as_slice() {
        [alone] if alone.number.is_none() => model.extend(pass, alone.params, &mut caches, &tokens),
        members => model.extend_together(pass, members, &mut caches, &tokens),
    }
}

fn choose(logits: &Tensor, row: usize, sampler: &mut LogitsProcessor) -> Result<u32> {
    let values = logits.view().row_range(row..row + 1).to_f32_vec();
    if values.iter().any(|v| !v.is_finite()) {
        let message =
            "logits are not finite; the weights or the adapter hold NaN or infinity".into();
        return Err(Error::Numeric { message });
    }
    let tensor = CandleTensor::from_vec(values, logits.cols(), &Device::Cpu);
    let token = tensor
        .and_then(|t| sampler.sample(&t))
        .map_err(ferrotune_kernels::Error::from)?;
    Ok(token)
}
