//! `bench --collective`: how fast a group of ranks sums a buffer.

use super::super::{Failure, Outcome};
use super::report::Percentiles;
use ferrotune::core::process_group::ProcessGroup;
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::dist::{Local, Tcp, Timing, measure_all_reduce};
use serde::Serialize;
use std::thread;
use std::time::Duration;

/// How ranks are joined. All of them are threads of this process.
#[derive(Clone, Copy, Debug, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Group {
    /// Threads that share memory
    Local,
    /// TCP over the loopback interface
    Tcp,
}

/// What was measured. Times in seconds, of the slowest rank each.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    group: Group,
    ranks: usize,
    bytes: usize,
    repeats: usize,
    /// Bytes of the buffer over the median time, in units of 10^9.
    gigabytes_per_second: f64,
    seconds: Percentiles,
}

/// Times `repeats` all-reduces of `bytes` over `ranks` ranks.
pub(super) fn run(group: Group, ranks: usize, bytes: usize, repeats: usize, json: bool) -> Outcome {
    let each = match group {
        Group::Local => time(Local::group(ranks, Duration::from_secs(60)), bytes, repeats),
        Group::Tcp => time(Tcp::local_group(ranks, &Timing::default())?, bytes, repeats),
    }?;
    let slowest = (0..repeats).map(|i| each.iter().map(|rank| rank[i]).fold(0.0, f64::max));
    let seconds = Percentiles::of(slowest.collect());
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        group,
        ranks,
        bytes,
        repeats,
        gigabytes_per_second: bytes as f64 / seconds.median / 1e9,
        seconds,
    };
    if json {
        let text = serde_json::to_string_pretty(&report);
        println!("{}", text.map_err(|e| Failure::Usage(e.to_string()))?);
    } else {
        println!(
            "all-reduce of {bytes} bytes over {ranks} ranks ({group:?}): {:.2} GB/s, median {:.3} ms, \
             best {:.3} ms of {repeats}",
            report.gigabytes_per_second,
            1e3 * report.seconds.median,
            1e3 * report.seconds.best,
        );
    }
    Ok(ExitCode::Done)
}

/// By rank, the seconds of each repeat.
fn time<G: ProcessGroup>(ranks: Vec<G>, bytes: usize, repeats: usize) -> Result<Vec<Vec<f64>>> {
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|mut rank| scope.spawn(move || measure_all_reduce(&mut rank, bytes, repeats)))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<Vec<f64>>>| {
            thread.join().unwrap_or_else(|_| {
                Err(Error::Numeric {
                    message: "the thread of a rank panicked".into(),
                })
            })
        };
        threads.into_iter().map(join).collect()
    })
}
