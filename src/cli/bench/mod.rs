//! `bench`: full optimizer steps of LoRA over random or real weights, timed.

mod collective;
mod flops;
mod machine;
mod measure;
mod report;
mod rows;
mod shapes;
mod trainer;

use super::{Failure, Outcome, print, print_line};
use ferrotune::core::config::Device as Choice;
use ferrotune::core::model::DecoderConfig;
use ferrotune::core::process_group::Solo;
use ferrotune::core::trainer::Trainer;
use ferrotune::core::{ExitCode, Result};
use ferrotune::kernels::{DType, Device};
use flops::flops_per_token;
use measure::{Measured, Plan, measure};
use report::{Percentiles, Report};
use rows::Steps;
use shapes::Shape;
use std::path::PathBuf;
use trainer::{TrainerArgs, trainer};

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).multiple(true).args(["shape", "model", "collective"])))]
pub(super) struct Args {
    /// Random weights of this shape: tiny, 256x4 (S), 768x12 (M), 135M, 360M, 1B (L), 8B, 70Bx8
    #[arg(long)]
    shape: Option<String>,
    /// Directory of a Hugging Face model, with its weights
    #[arg(long, conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Time all-reduces over ranks that are joined like this, and steps of all ranks beside steps of one (of
    /// --shape or --model, else of 256x4)
    #[arg(long, value_enum)]
    collective: Option<collective::Group>,
    /// Ranks of `--collective`
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    ranks: u16,
    /// Bytes of the buffer of `--collective`
    #[arg(long, default_value_t = 4_000_000)]
    bytes: usize,
    /// JSON Lines of `{"input_ids": [...]}` instead of random tokens, every token trained
    #[arg(long)]
    rows: Option<PathBuf>,
    /// Timed steps; of --collective, all-reduces and steps
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
    #[command(flatten)]
    trainer: TrainerArgs,
    /// Where to train: auto, cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: Choice,
    /// After the timed steps, time each kernel of a few more (GPU only; no step is then recorded as a graph)
    #[arg(long)]
    profile: bool,
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

pub(super) fn run(args: &Args) -> Outcome {
    if let Some(group) = args.collective {
        return collective::run(args, group);
    }
    let shape = args.shape.as_deref().map(Shape::find).transpose()?;
    if args.config {
        let shape = shape.ok_or_else(|| Failure::Usage("--config needs --shape".into()))?;
        print_line(format_args!("{:#}", shape.hf_config()))?;
        return Ok(ExitCode::Done);
    }
    start_threads(args.threads)?;
    let start_rss = machine::resident_bytes();
    let device = ferrotune::device::open(args.device)?;
    let gpu_start = machine::gpu_taken(&device)?;
    // On a GPU first, so that its memory is back in the pool when the run takes its own.
    let peak = device.is_cuda().then(|| peak(args, &device)).transpose()?;
    let decoder = decoder(args, shape.as_ref())?;
    let steps = steps(args, shape.as_ref(), &decoder)?;
    let mut trainer = trainer(args, &device, &decoder, steps.max_tokens(), Box::new(Solo))?;
    let plan = Plan {
        warmup: args.warmup,
        timed: args.steps,
        learning_rate: args.learning_rate,
        profile: args.profile,
    };
    let measured = measure(plan, &device, &mut trainer, &steps)?;
    let start = Start {
        device,
        rss: start_rss,
        gpu: gpu_start,
        peak: match peak {
            Some(peak) => peak,
            None => self::peak(args, &Device::Cpu)?,
        },
    };
    let report = report(args, &start, &trainer, &steps, measured);
    if args.json {
        let text = serde_json::to_string_pretty(&report);
        print_line(text.map_err(|e| Failure::Usage(e.to_string()))?)?;
    } else {
        print(report)?;
    }
    Ok(ExitCode::Done)
}

/// Starts the worker threads, so that their memory counts as the runtime's.
fn start_threads(threads: Option<usize>) -> Result<(), Failure> {
    if threads == Some(0) {
        return Err(Failure::Usage("--threads: expected 1 or more".into()));
    }
    Ok(ferrotune::threads::start(threads)?)
}

fn decoder(args: &Args, shape: Option<&Shape>) -> Result<DecoderConfig, Failure> {
    match (shape, &args.model) {
        (Some(shape), _) => Ok(shape.decoder()?),
        (None, Some(directory)) => Ok(DecoderConfig::open(directory)?),
        (None, None) => Err(Failure::Usage("give --shape or --model".into())),
    }
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

/// What is known before the first step.
struct Start {
    device: Device,
    rss: Option<u64>,
    /// GPU memory taken, by whomever, with nothing of the run in it.
    gpu: Option<u64>,
    peak: machine::Peak,
}

/// The rate of a large product: on a CPU in f32 whatever the run's dtype.
fn peak(args: &Args, device: &Device) -> Result<machine::Peak> {
    match device {
        Device::Cpu => machine::gemm_peak(device, DType::F32),
        Device::Cuda(_) => machine::gemm_peak(device, args.trainer.dtype()),
    }
}

fn report(
    args: &Args,
    start: &Start,
    trainer: &Trainer,
    steps: &Steps,
    measured: Measured,
) -> Report {
    let decoder = trainer.model().config();
    let trainable = trainer.params().layout().trainable();
    let tokens = steps.tokens_per_step();
    let flops_per_token = flops_per_token(decoder, trainable, steps.mean_length());
    let step_seconds = Percentiles::of(measured.times.clone());
    let tokens_per_second = tokens as f64 / step_seconds.median;
    let rate = flops_per_token * tokens_per_second;
    let [load_peak, step_peak] = measured.peaks;
    let above = |from: Option<u64>| Some(step_peak?.saturating_sub(from?));
    let [gpu_loaded, gpu_peak] = measured.gpu_taken;
    let above_gpu = |from: Option<u64>| Some(gpu_peak?.saturating_sub(from?));
    Report {
        version: env!("CARGO_PKG_VERSION"),
        commit: option_env!("FERROTUNE_COMMIT"),
        model: model_name(args),
        method: trainer.adapter().describe(),
        dtype: trainer.model().weight_dtype().to_string(),
        quantised: args.trainer.quantise().map(|q| q.format.name()),
        device: start.device.to_string(),
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
        gemm_peak: start.peak.what.clone(),
        gemm_peak_gflops: start.peak.flops / 1e9,
        share_of_gemm_peak: rate / start.peak.flops,
        launches_per_step: measured.launches,
        launch_times: measured.launch_times,
        peak_rss: load_peak.max(step_peak),
        step_peak_rss: step_peak,
        start_rss: start.rss,
        loaded_rss: measured.loaded_rss,
        memory_above_start: above(start.rss),
        memory_above_loaded: above(measured.loaded_rss),
        gpu_memory_above_start: above_gpu(start.gpu),
        gpu_memory_above_loaded: above_gpu(gpu_loaded),
        seconds_exec_to_loaded: measured.exec_to_loaded,
        seconds_exec_to_first_step: measured.exec_to_first_step,
    }
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
