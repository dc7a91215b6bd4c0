//! `bench --collective`: how fast a group of ranks sums a buffer, and what a rank's step costs among others.

use super::super::{Failure, Outcome, print_line};
use super::measure::{Plan, measure};
use super::report::Percentiles;
use super::rows::Steps;
use super::shapes::Shape;
use super::{Args, decoder, model_name, steps, trainer};
use ferrotune::core::model::DecoderConfig;
use ferrotune::core::process_group::{ProcessGroup, Solo};
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::dist::nccl::NcclOptions;
use ferrotune::dist::{Local, Nccl, Tcp, Timing, measure_all_reduce};
use ferrotune::kernels::Device;
use serde::Serialize;
use std::thread;
use std::time::Duration;

/// Whose steps are timed where none are named.
const SHAPE: &str = "256x4";
/// Longest wait for a peer.
const TIMEOUT: Duration = Duration::from_secs(600);

/// How ranks are joined. All of them are threads of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Group {
    /// Threads that share memory
    Local,
    /// TCP over the loopback interface
    Tcp,
    /// NCCL, a GPU for each rank
    Nccl,
}

/// What was measured. Times in seconds, of the slowest rank each.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    group: Group,
    device: String,
    ranks: usize,
    threads_per_rank: usize,
    bytes: usize,
    repeats: usize,
    /// Bytes of the buffer over the median time, in units of 10^9.
    gigabytes_per_second: f64,
    seconds: Percentiles,
    model: String,
    tokens_per_rank_and_step: usize,
    /// Of one rank by itself, with the threads that it has among others.
    step_seconds_alone: Percentiles,
    step_seconds: Percentiles,
    /// Median step alone over median step of all: 1 where ranks cost each other nothing.
    data_parallel_efficiency: f64,
}

/// Times all-reduces and steps of `args.ranks` ranks.
pub(super) fn run(args: &Args, group: Group) -> Outcome {
    let shape = match (&args.shape, &args.model) {
        (Some(name), _) => Some(Shape::find(name)?),
        (None, Some(_)) => None,
        (None, None) => Some(Shape::find(SHAPE)?),
    };
    let decoder = decoder(args, shape.as_ref())?;
    let steps = steps(args, shape.as_ref(), &decoder)?;
    let ranks = usize::from(args.ranks);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = (args.threads.unwrap_or(cores) / ranks).max(1);
    let bench = Bench {
        args,
        group,
        threads,
        decoder: &decoder,
        steps: &steps,
    };
    let alone = bench.on_thread(0, || bench.train(&bench.device(0)?, Box::new(Solo)))?;
    let each = bench.on_each_rank()?;
    let slowest = |times: fn(&Times) -> &Vec<f64>| {
        let at = |i: usize| each.iter().map(|rank| times(rank)[i]).fold(0.0, f64::max);
        Percentiles::of((0..args.steps as usize).map(at).collect())
    };
    let (seconds, step) = (slowest(|t| &t.all_reduces), slowest(|t| &t.steps));
    let alone = Percentiles::of(alone);
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        group,
        device: bench.device(0)?.to_string(),
        ranks,
        threads_per_rank: threads,
        bytes: args.bytes,
        repeats: args.steps as usize,
        gigabytes_per_second: args.bytes as f64 / seconds.median / 1e9,
        seconds,
        model: match shape {
            Some(shape) => shape.name.to_owned(),
            None => model_name(args),
        },
        tokens_per_rank_and_step: steps.tokens_per_step(),
        step_seconds_alone: alone,
        step_seconds: step,
        data_parallel_efficiency: alone.median / step.median,
    };
    print(&report, args.json)?;
    Ok(ExitCode::Done)
}

fn print(report: &Report, json: bool) -> Result<(), Failure> {
    if json {
        let text = serde_json::to_string_pretty(report);
        return Ok(print_line(
            text.map_err(|e| Failure::Usage(e.to_string()))?,
        )?);
    }
    let Report {
        group,
        ranks,
        bytes,
        repeats,
        seconds,
        ..
    } = report;
    print_line(format_args!(
        "all-reduce of {bytes} bytes over {ranks} ranks ({group:?}): {:.2} GB/s, median {:.3} ms, best {:.3} ms of \
         {repeats}",
        report.gigabytes_per_second,
        1e3 * seconds.median,
        1e3 * seconds.best,
    ))?;
    Ok(print_line(format_args!(
        "steps of {}, {} tokens and {} threads a rank: {:.4} s alone, {:.4} s among {ranks}: efficiency {:.1} %",
        report.model,
        report.tokens_per_rank_and_step,
        report.threads_per_rank,
        report.step_seconds_alone.median,
        report.step_seconds.median,
        100.0 * report.data_parallel_efficiency,
    ))?)
}

/// What each rank does.
#[derive(Clone, Copy)]
struct Bench<'a> {
    args: &'a Args,
    group: Group,
    threads: usize,
    decoder: &'a DecoderConfig,
    steps: &'a Steps,
}

/// Of one rank: seconds of each repeat.
struct Times {
    all_reduces: Vec<f64>,
    steps: Vec<f64>,
}

impl Bench<'_> {
    fn device(&self, rank: usize) -> Result<Device> {
        match self.group {
            Group::Nccl => Ok(Device::cuda(rank)?),
            Group::Local | Group::Tcp => ferrotune::device::open_for(self.args.device, rank),
        }
    }

    /// By rank.
    fn on_each_rank(&self) -> Result<Vec<Times>> {
        let ranks = usize::from(self.args.ranks);
        match self.group {
            Group::Local => {
                self.scatter(Local::group(ranks, TIMEOUT), |group, _| Ok(Box::new(group)))
            }
            Group::Tcp => self.scatter(Tcp::local_group(ranks, &Timing::default())?, |group, _| {
                Ok(Box::new(group))
            }),
            Group::Nccl => self.scatter(Local::group(ranks, TIMEOUT), |host, device| {
                let options = NcclOptions {
                    timeout: TIMEOUT,
                    ..NcclOptions::default()
                };
                Ok(Box::new(Nccl::new(Box::new(host), device, options)?))
            }),
        }
    }

    /// A thread for each of `hosts`, from which `join` makes its group.
    fn scatter<H: Send>(
        &self,
        hosts: Vec<H>,
        join: impl Fn(H, &Device) -> Result<Box<dyn ProcessGroup>> + Sync,
    ) -> Result<Vec<Times>> {
        let (bench, join) = (*self, &join);
        thread::scope(|scope| {
            let start = |(rank, host)| {
                scope.spawn(move || {
                    bench.on_thread(rank, || bench.rank(rank, |device| join(host, device)))
                })
            };
            let threads: Vec<_> = hosts.into_iter().enumerate().map(start).collect();
            let end = |thread: thread::ScopedJoinHandle<'_, Result<Times>>| {
                thread.join().unwrap_or_else(|_| {
                    Err(Error::Numeric {
                        message: "the thread of a rank panicked".into(),
                    })
                })
            };
            threads.into_iter().map(end).collect()
        })
    }

    fn rank(
        &self,
        rank: usize,
        join: impl FnOnce(&Device) -> Result<Box<dyn ProcessGroup>>,
    ) -> Result<Times> {
        let device = self.device(rank)?;
        let mut group = join(&device)?;
        let repeats = self.args.steps as usize;
        Ok(Times {
            all_reduces: measure_all_reduce(group.as_mut(), &device, self.args.bytes, repeats)?,
            steps: self.train(&device, group)?,
        })
    }

    /// Seconds of each timed step of a rank of `group`, which is on `device`.
    fn train(&self, device: &Device, group: Box<dyn ProcessGroup>) -> Result<Vec<f64>> {
        let Args {
            warmup,
            steps,
            learning_rate,
            ..
        } = *self.args;
        let max_tokens = self.steps.max_tokens();
        let mut trainer = trainer(self.args, device, self.decoder, max_tokens, group)?;
        let plan = Plan {
            warmup,
            timed: steps,
            learning_rate,
            profile: false,
        };
        Ok(measure(plan, device, &mut trainer, self.steps)?.times)
    }

    /// `work` in a pool of a rank's threads.
    fn on_thread<R: Send>(
        &self,
        rank: usize,
        work: impl FnOnce() -> Result<R> + Send,
    ) -> Result<R> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .thread_name(move |i| format!("rank {rank} thread {i}"))
            .build()
            .map_err(|e| Error::config("threads", e.to_string()))?;
        pool.install(work)
    }
}
