//! `bench`: full optimizer steps of LoRA over random or real weights, timed.

mod machine;
mod report;
mod rows;
mod shapes;

use super::{Failure, Outcome};
use ferrotune::core::adapter::Adapter;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, ModelPlan, RandomWeights, WeightSource};
use ferrotune::core::process_group::Solo;
use ferrotune::core::trainer::{Trainer, TrainerOptions};
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::kernels::DType;
use ferrotune::lora::{LoraAdapter, LoraConfig, TargetModules};
use report::{Percentiles, Report};
use rows::Steps;
use shapes::Shape;
use std::path::PathBuf;
use std::time::Instant;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["shape", "model"])))]
pub(super) struct Args {
    /// Random weights of this shape: tiny, 256x4 (S), 768x12 (M), 135M, 360M, 1B (L), 8B
    #[arg(long)]
    shape: Option<String>,
    /// Directory of a Hugging Face model, with its weights
    #[arg(long)]
    model: Option<PathBuf>,
    /// Start from this adapter, which also says what is trained
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// JSON Lines of `{"input_ids": [...]}` instead of random tokens, every token trained
    #[arg(long)]
    rows: Option<PathBuf>,
    /// Timed steps
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Steps before the timed ones
    #[arg(long, default_value_t = 3)]
    warmup: u32,
    /// Rows of a step [default: as is usual for the shape, else 4]
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens of a random row [default: as is usual for the shape, else 256]
    #[arg(long)]
    seq: Option<usize>,
    /// LoRA rank on every linear of the layers, alpha twice that
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Element type of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Float32)]
    dtype: Dtype,
    /// Learning rate, constant
    #[arg(long, default_value_t = 1e-4)]
    learning_rate: f64,
    /// Threads [default: one per core]
    #[arg(long)]
    threads: Option<usize>,
    /// Seed of random weights, tokens and initial values
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The report as JSON
    #[arg(long)]
    json: bool,
    /// Print the `config.json` of the shape, and stop
    #[arg(long, requires = "shape")]
    config: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Dtype {
    /// 32-bit floats
    Float32,
    /// Brain floats
    Bfloat16,
}

impl Dtype {
    fn kernel(self) -> DType {
        match self {
            Self::Float32 => DType::F32,
            Self::Bfloat16 => DType::Bf16,
        }
    }
}

/// Times and sizes noted on the way.
struct Measured {
    start_rss: Option<u64>,
    loaded_rss: Option<u64>,
    /// Peak before the steps, and peak during them.
    peaks: [Option<u64>; 2],
    exec_to_loaded: Option<f64>,
    exec_to_first_step: Option<f64>,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    /// Seconds of each timed step.
    times: Vec<f64>,
    cpu_seconds: Option<f64>,
}

pub(super) fn run(args: &Args) -> Outcome {
    let shape = args.shape.as_deref().map(Shape::find).transpose()?;
    if args.config {
        let shape = shape.ok_or_else(|| Failure::Usage("--config needs --shape".into()))?;
        println!("{:#}", shape.hf_config());
        return Ok(ExitCode::Done);
    }
    start_threads(args.threads)?;
    let start_rss = machine::resident_bytes();
    let decoder = match (&shape, &args.model) {
        (Some(shape), _) => shape.decoder()?,
        (None, Some(directory)) => DecoderConfig::open(directory)?,
        (None, None) => return Err(Failure::Usage("give --shape or --model".into())),
    };
    let steps = steps(args, shape.as_ref(), &decoder)?;
    let mut trainer = trainer(args, &decoder, steps.max_tokens())?;
    let mut measured = measure(args, &mut trainer, &steps)?;
    measured.start_rss = start_rss;
    let report = report(args, &trainer, &steps, measured)?;
    if args.json {
        let text = serde_json::to_string_pretty(&report);
        println!("{}", text.map_err(|e| Failure::Usage(e.to_string()))?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::Done)
}

/// Starts the worker threads, so that their memory counts as the runtime's.
fn start_threads(threads: Option<usize>) -> Result<(), Failure> {
    let mut pool = rayon::ThreadPoolBuilder::new();
    if let Some(threads) = threads {
        if threads == 0 {
            return Err(Failure::Usage("--threads: expected 1 or more".into()));
        }
        pool = pool.num_threads(threads);
    }
    pool.build_global()
        .map_err(|e| Failure::Usage(format!("--threads: {e}")))
}

fn steps(args: &Args, shape: Option<&Shape>, decoder: &DecoderConfig) -> Result<Steps, Failure> {
    if args.batch == Some(0) || args.seq.is_some_and(|seq| seq < 2) {
        let message = "--batch needs 1 row or more, --seq 2 tokens or more";
        return Err(Failure::Usage(message.into()));
    }
    if let Some(path) = &args.rows {
        return Ok(Steps::from_file(path, args.batch, decoder.vocab_size)?);
    }
    let batch = args.batch.or(shape.map(|s| s.batch)).unwrap_or(4);
    let seq = args.seq.or(shape.map(|s| s.seq)).unwrap_or(256);
    Ok(Steps::random(args.seed, batch, seq, decoder.vocab_size))
}

fn trainer(args: &Args, decoder: &DecoderConfig, max_tokens: usize) -> Result<Trainer, Failure> {
    let files = args.model.as_deref().map(ModelFiles::open).transpose()?;
    let random = RandomWeights { seed: args.seed };
    let source: &dyn WeightSource = match &files {
        Some(files) => files,
        None => &random,
    };
    let options = TrainerOptions {
        seed: args.seed,
        weight_dtype: args.dtype.kernel(),
        activation_dtype: args.dtype.kernel(),
        max_tokens,
        ..TrainerOptions::default()
    };
    let method = adapter(args, decoder)?;
    let mut trainer = Trainer::new(decoder, source, method, Box::new(Solo), options)?;
    if let Some(directory) = &args.adapter {
        adapter(args, decoder)?.load(trainer.params_mut(), directory)?;
    }
    Ok(trainer)
}

/// The adapter of `--adapter`, else LoRA on every linear of the layers.
fn adapter(args: &Args, decoder: &DecoderConfig) -> Result<Box<dyn Adapter>> {
    if let Some(directory) = &args.adapter {
        return ferrotune::lora::load(directory, &decoder.model_type);
    }
    let config = LoraConfig {
        rank: args.rank,
        alpha: 2.0 * args.rank as f64,
        target_modules: Some(TargetModules::AllLinear),
        ..LoraConfig::default()
    };
    Ok(Box::new(LoraAdapter::new(config, &decoder.model_type)?))
}

fn measure(args: &Args, trainer: &mut Trainer, steps: &Steps) -> Result<Measured> {
    let mut measured = Measured {
        start_rss: None,
        loaded_rss: machine::resident_bytes(),
        peaks: [machine::peak_resident_bytes(), None],
        exec_to_loaded: machine::seconds_since_exec(),
        exec_to_first_step: None,
        losses: Vec::new(),
        grad_norms: Vec::new(),
        times: Vec::new(),
        cpu_seconds: None,
    };
    machine::reset_peak();
    let mut cpu_before = machine::cpu_seconds();
    for step in 0..args.warmup + args.steps {
        if step == args.warmup {
            cpu_before = machine::cpu_seconds();
        }
        let batch = steps.batch(step as usize);
        let begin = Instant::now();
        let report = trainer.step(std::slice::from_ref(&batch), args.learning_rate)?;
        let seconds = begin.elapsed().as_secs_f64();
        if step == 0 {
            measured.exec_to_first_step = machine::seconds_since_exec();
        }
        if step >= args.warmup {
            measured.times.push(seconds);
        }
        measured.losses.push(report.loss());
        measured.grad_norms.push(report.grad_norm);
    }
    measured.peaks[1] = machine::peak_resident_bytes();
    measured.cpu_seconds = cpu_before
        .zip(machine::cpu_seconds())
        .map(|(before, after)| (after - before) / f64::from(args.steps));
    Ok(measured)
}

fn report(
    args: &Args,
    trainer: &Trainer,
    steps: &Steps,
    measured: Measured,
) -> Result<Report, Error> {
    let decoder = trainer.model().config();
    let trainable = trainer.params().layout().trainable();
    let tokens = steps.tokens_per_step();
    let flops_per_token = flops_per_token(decoder, trainable, steps.mean_length());
    let gemm_peak = machine::gemm_peak()?;
    let step_seconds = Percentiles::of(measured.times.clone());
    let tokens_per_second = tokens as f64 / step_seconds.median;
    let rate = flops_per_token * tokens_per_second;
    let [load_peak, step_peak] = measured.peaks;
    let above = |from: Option<u64>| Some(step_peak?.saturating_sub(from?));
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        commit: option_env!("FERROTUNE_COMMIT"),
        model: model_name(args),
        method: trainer.adapter().describe(),
        dtype: trainer.model().weight_dtype().to_string(),
        threads: rayon::current_num_threads(),
        parameters: decoder.parameters(),
        trainable_parameters: trainable,
        rows_per_step: steps.rows_per_step(),
        tokens_per_step: tokens,
        warmup_steps: args.warmup as usize,
        steps: args.steps as usize,
        losses: measured.losses,
        grad_norms: measured.grad_norms,
        tokens_per_second,
        step_seconds,
        step_times: measured.times,
        cpu_seconds_per_step: measured.cpu_seconds,
        flops_per_token,
        model_gflops: rate / 1e9,
        gemm_peak_gflops: gemm_peak / 1e9,
        share_of_gemm_peak: rate / gemm_peak,
        peak_rss: load_peak.max(step_peak),
        step_peak_rss: step_peak,
        start_rss: measured.start_rss,
        loaded_rss: measured.loaded_rss,
        memory_above_start: above(measured.start_rss),
        memory_above_loaded: above(measured.loaded_rss),
        seconds_exec_to_loaded: measured.exec_to_loaded,
        seconds_exec_to_first_step: measured.exec_to_first_step,
    })
}

/// What is measured: the shape's name, or the last part of the directory's.
fn model_name(args: &Args) -> String {
    match (&args.shape, &args.model) {
        (Some(shape), _) => shape.clone(),
        (None, Some(directory)) => directory
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        (None, None) => String::new(),
    }
}

/// Floating point operations that a LoRA step needs per token, nothing recomputed.
///
/// - 4 N: the linears of the layers (N weights), 2 forward and 2 for the gradient of their input;
///   a frozen weight has no gradient.
/// - 4 V D: the head likewise, every token being trained.
/// - 7 S H E per layer: causal attention over rows of S tokens, 2 forward and 5 backward
///   (5 products of which each sees half of the S x S square).
/// - 6 per trained weight: forward, gradient of its input, gradient of itself.
fn flops_per_token(decoder: &DecoderConfig, trainable: usize, mean_length: f64) -> f64 {
    let plan = ModelPlan::new(decoder);
    let linears: usize = plan
        .sites
        .iter()
        .filter(|site| site.layer.is_some() && site.in_features > 1)
        .map(|site| site.in_features * site.out_features)
        .sum();
    let head = decoder.vocab_size * decoder.hidden_size;
    let attention = 7.0 * mean_length * (decoder.layers * decoder.q_width()) as f64;
    (4 * (linears + head) + 6 * trainable) as f64 + attention
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flops_are_those_of_the_shape_counted_by_hand() {
        let decoder = Shape::find("tiny").and_then(|s| s.decoder()).expect("tiny");
        // Per layer q, o 64 x 64, k, v 32 x 64, three of 192 x 64; head 1024 x 64; 2 layers.
        let linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64);
        let expected = 4 * (linears + 1024 * 64) + 6 * 100 + 7 * 64 * 2 * 64;
        assert_eq!(flops_per_token(&decoder, 100, 64.0), f64::from(expected));
    }
}
