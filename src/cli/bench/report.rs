//! What a benchmark found, for machines (JSON) and for people.

use ferrotune::kernels::cuda::LaunchTime;
use serde::Serialize;
use std::fmt;

/// The result of one run. Memory in bytes, times in seconds; `None` where the system cannot say.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    pub(super) commit: Option<&'static str>,
    pub(super) model: String,
    pub(super) method: String,
    pub(super) dtype: String,
    /// What the linears of the base are held in, if not as values: nf4, fp4 or int8.
    pub(super) quantised: Option<&'static str>,
    pub(super) device: String,
    pub(super) threads: usize,
    pub(super) parameters: usize,
    pub(super) trainable_parameters: usize,
    pub(super) rows_per_step: usize,
    pub(super) tokens_per_step: usize,
    pub(super) warmup_steps: usize,
    pub(super) steps: usize,
    /// Loss of every step, warm-up included: mean over the trained tokens.
    pub(super) losses: Vec<f64>,
    pub(super) grad_norms: Vec<f64>,
    /// Of the median step.
    pub(super) tokens_per_second: f64,
    pub(super) step_seconds: Percentiles,
    /// Seconds of each timed step.
    pub(super) step_times: Vec<f64>,
    pub(super) cpu_seconds_per_step: Option<f64>,
    pub(super) flops_per_token: f64,
    pub(super) model_gflops: f64,
    /// The product that gives the peak.
    pub(super) gemm_peak: String,
    pub(super) gemm_peak_gflops: f64,
    pub(super) share_of_gemm_peak: f64,
    /// Kernels, products and graphs that a timed step launches on a GPU.
    pub(super) launches_per_step: Option<f64>,
    /// What took how long of a step, longest first; empty without `--profile`.
    pub(super) launch_times: Vec<LaunchShare>,
    /// Largest resident memory from exec to the last step.
    pub(super) peak_rss: Option<u64>,
    /// Largest resident memory during the steps.
    pub(super) step_peak_rss: Option<u64>,
    /// Resident memory when the command began, before anything was read.
    pub(super) start_rss: Option<u64>,
    /// Resident memory with weights, parameters and moments in place, before the first step.
    pub(super) loaded_rss: Option<u64>,
    /// `step_peak_rss - start_rss`.
    pub(super) memory_above_start: Option<u64>,
    /// `step_peak_rss - loaded_rss`.
    pub(super) memory_above_loaded: Option<u64>,
    /// GPU memory taken at most during the steps, as the driver says, less what was taken before
    /// weights and buffers. It counts other processes, so measure on a GPU that has none.
    pub(super) gpu_memory_above_start: Option<u64>,
    /// The same, less what was taken before the first step.
    pub(super) gpu_memory_above_loaded: Option<u64>,
    pub(super) seconds_exec_to_loaded: Option<f64>,
    pub(super) seconds_exec_to_first_step: Option<f64>,
}

/// Times of the timed steps.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Percentiles {
    pub(super) median: f64,
    pub(super) p10: f64,
    pub(super) p90: f64,
    pub(super) best: f64,
}

impl Percentiles {
    /// Of at least one time; linear between neighbours.
    pub(super) fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |q: f64| {
            let place = q * (times.len() - 1) as f64;
            let (low, high) = (times[place.floor() as usize], times[place.ceil() as usize]);
            low + (high - low) * place.fract()
        };
        Self {
            median: at(0.5),
            p10: at(0.1),
            p90: at(0.9),
            best: at(0.0),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: Option<u64>| match bytes {
            Some(bytes) => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
            None => "unknown".into(),
        };
        let seconds = |s: Option<f64>| s.map_or("unknown".into(), |s| format!("{s:.2} s"));
        let step = self.step_seconds;
        let rows = [
            (
                "model",
                format!(
                    "{}, {:.1} M parameters, {} trained",
                    self.model,
                    self.parameters as f64 / 1e6,
                    self.trainable_parameters
                ),
            ),
            (
                "method",
                format!(
                    "{}, {}{}, {}, {} threads",
                    self.method,
                    self.dtype,
                    self.quantised
                        .map_or(String::new(), |f| format!(" from {f}")),
                    self.device,
                    self.threads
                ),
            ),
            (
                "step",
                format!(
                    "{:.4} s median ({:.4} p10, {:.4} p90) of {}, {} tokens in {} rows",
                    step.median,
                    step.p10,
                    step.p90,
                    self.steps,
                    self.tokens_per_step,
                    self.rows_per_step
                ),
            ),
            ("speed", format!("{:.1} tokens/s", self.tokens_per_second)),
            (
                "of the peak",
                format!(
                    "{:.1} % ({:.1} of {:.1} GFLOP/s, {})",
                    100.0 * self.share_of_gemm_peak,
                    self.model_gflops,
                    self.gemm_peak_gflops,
                    self.gemm_peak
                ),
            ),
            (
                "memory",
                format!(
                    "{} above start, {} of it beside weights; peak {}",
                    mib(self.memory_above_start),
                    mib(self.memory_above_loaded),
                    mib(self.peak_rss)
                ),
            ),
            (
                "first step",
                format!(
                    "done {} after exec",
                    seconds(self.seconds_exec_to_first_step)
                ),
            ),
        ];
        for (name, value) in rows {
            writeln!(f, "{name:>12}  {value}")?;
        }
        let Some(launches) = self.launches_per_step else {
            return Ok(());
        };
        writeln!(
            f,
            "{:>12}  {} above start, {} of it beside weights; {launches:.0} launches per step",
            "GPU",
            mib(self.gpu_memory_above_start),
            mib(self.gpu_memory_above_loaded)
        )?;
        for launch in &self.launch_times {
            let (time, share) = (launch.milliseconds, 100.0 * launch.share);
            let (calls, name) = (launch.calls, &launch.name);
            writeln!(f, "{time:>12.3} ms {share:>5.1} % {calls:>7.1} x {name}")?;
        }
        Ok(())
    }
}

/// Launches of one name in a step, of a mean over a few.
#[derive(Debug, Serialize)]
pub(super) struct LaunchShare {
    pub(super) name: String,
    pub(super) calls: f64,
    pub(super) milliseconds: f64,
    /// Of the time of all launches.
    pub(super) share: f64,
}

impl LaunchShare {
    pub(super) fn per_step(times: &[LaunchTime], steps: u32) -> Vec<Self> {
        let all: f64 = times.iter().map(|time| time.milliseconds).sum();
        let of_step = |time: &LaunchTime| Self {
            name: time.name.clone(),
            calls: time.calls as f64 / f64::from(steps),
            milliseconds: time.milliseconds / f64::from(steps),
            share: time.milliseconds / all,
        };
        times.iter().map(of_step).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_their_neighbours() {
        let p = Percentiles::of(vec![4.0, 1.0, 3.0, 2.0, 5.0]);
        assert_eq!((p.best, p.median), (1.0, 3.0));
        assert!((p.p10 - 1.4).abs() < 1e-12 && (p.p90 - 4.6).abs() < 1e-12);
        let one = Percentiles::of(vec![2.0]);
        assert_eq!((one.p10, one.median, one.p90), (2.0, 2.0, 2.0));
    }
}
