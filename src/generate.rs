//! Text from a model: batched decoding with a key-value cache, greedy or sampled.

use candle_core::{Device, Tensor as CandleTensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use ferrotune_core::model::{KvCache, Model, Pass};
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
    /// Seed of the draws; each prompt has a stream of its own.
    pub seed: u64,
    /// Tokens that end an answer; they are not part of it.
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

/// One answer in progress.
struct Answer {
    /// Index of its prompt.
    prompt: usize,
    cache: KvCache,
    /// Tokens to feed next.
    next: Vec<u32>,
    sampler: LogitsProcessor,
}

/// The answer to each prompt, in order. An answer does not depend on what it is batched with.
///
/// # Errors
/// [`Error::Config`] if a prompt is empty or longer than the model's context.
pub fn generate(
    model: &Model,
    params: &FlatBuffer,
    pass: Pass<'_>,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
) -> Result<Vec<Vec<u32>>> {
    for (index, prompt) in prompts.iter().enumerate() {
        capacity(model, index, prompt, options)?;
    }
    let mut answers = vec![Vec::new(); prompts.len()];
    if options.max_new_tokens == 0 {
        return Ok(answers);
    }
    let mut waiting = prompts.iter().enumerate().rev().collect::<Vec<_>>();
    let mut running: Vec<Answer> = Vec::new();
    while !(waiting.is_empty() && running.is_empty()) {
        while running.len() < options.batch_size.max(1) {
            let Some((index, prompt)) = waiting.pop() else {
                break;
            };
            running.push(start(model, pass, index, prompt, options)?);
        }
        let logits = step(model, params, pass, &mut running)?;
        let mut still = Vec::with_capacity(running.len());
        for (row, mut answer) in running.into_iter().enumerate() {
            let token = choose(&logits, row, &mut answer.sampler)?;
            let given = &mut answers[answer.prompt];
            if options.stop_ids.contains(&token) {
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

fn start(
    model: &Model,
    pass: Pass<'_>,
    index: usize,
    prompt: &[u32],
    options: &GenerateOptions,
) -> Result<Answer> {
    let capacity = capacity(model, index, prompt, options)?;
    let seed = rng::mix(rng::key_for(options.seed, "generate"), index as u64);
    Ok(Answer {
        prompt: index,
        cache: KvCache::new(model, pass.dtype, capacity),
        next: prompt.to_vec(),
        sampler: LogitsProcessor::from_sampling(seed, options.sampling()),
    })
}

fn step(
    model: &Model,
    params: &FlatBuffer,
    pass: Pass<'_>,
    running: &mut [Answer],
) -> Result<Tensor> {
    let (mut caches, mut tokens) = (Vec::new(), Vec::new());
    for answer in running {
        caches.push(&mut answer.cache);
        tokens.push(answer.next.as_slice());
    }
    model.extend(pass, params, &mut caches, &tokens)
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
