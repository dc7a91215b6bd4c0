//! Runs the steps and notes what they took.

use super::machine;
use super::report::LaunchShare;
use super::rows::Steps;
use ferrotune::core::Result;
use ferrotune::core::trainer::Trainer;
use ferrotune::kernels::Device;
use std::time::Instant;

/// Steps that are run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) warmup: u32,
    pub(super) timed: u32,
    pub(super) learning_rate: f64,
    /// Whether launches of a few more steps are timed.
    pub(super) profile: bool,
}

/// Steps of a profile.
const PROFILED: u32 = 3;

/// Times and sizes noted on the way.
pub(super) struct Measured {
    pub(super) loaded_rss: Option<u64>,
    /// Peak before the steps, and peak during them.
    pub(super) peaks: [Option<u64>; 2],
    /// GPU memory that is taken, by whomever, before the steps and at most during them.
    pub(super) gpu_taken: [Option<u64>; 2],
    pub(super) exec_to_loaded: Option<f64>,
    pub(super) exec_to_first_step: Option<f64>,
    pub(super) losses: Vec<f64>,
    pub(super) grad_norms: Vec<f64>,
    /// Seconds of each timed step.
    pub(super) times: Vec<f64>,
    /// Per timed step.
    pub(super) cpu_seconds: Option<f64>,
    pub(super) launches: Option<f64>,
    /// Empty without a profile.
    pub(super) launch_times: Vec<LaunchShare>,
}

/// Steps of `trainer` on `device`; each ends when the GPU has done all of it.
pub(super) fn measure(
    plan: Plan,
    device: &Device,
    trainer: &mut Trainer,
    steps: &Steps,
) -> Result<Measured> {
    device.synchronize()?;
    let mut measured = Measured {
        loaded_rss: machine::resident_bytes(),
        peaks: [machine::peak_resident_bytes(), None],
        gpu_taken: [machine::gpu_taken(device)?; 2],
        exec_to_loaded: machine::seconds_since_exec(),
        exec_to_first_step: None,
        losses: Vec::new(),
        grad_norms: Vec::new(),
        times: Vec::new(),
        cpu_seconds: None,
        launches: None,
        launch_times: Vec::new(),
    };
    machine::reset_peak();
    let mut before = Counters::now(device);
    for step in 0..plan.warmup + plan.timed {
        if step == plan.warmup {
            before = Counters::now(device);
        }
        let batch = steps.batch(step as usize);
        let begin = Instant::now();
        let report = trainer.step(std::slice::from_ref(&batch), plan.learning_rate)?;
        device.synchronize()?;
        let seconds = begin.elapsed().as_secs_f64();
        if step == 0 {
            measured.exec_to_first_step = machine::seconds_since_exec();
        }
        if step >= plan.warmup {
            measured.times.push(seconds);
        }
        measured.losses.push(report.loss());
        measured.grad_norms.push(report.grad_norm);
        measured.gpu_taken[1] = measured.gpu_taken[1].max(machine::gpu_taken(device)?);
    }
    measured.peaks[1] = machine::peak_resident_bytes();
    let after = Counters::now(device);
    let per_step =
        |before: Option<f64>, after: Option<f64>| Some((after? - before?) / f64::from(plan.timed));
    measured.cpu_seconds = per_step(before.cpu_seconds, after.cpu_seconds);
    measured.launches = per_step(before.launches, after.launches);
    if let (true, Device::Cuda(gpu)) = (plan.profile, device) {
        gpu.start_profile()?;
        for step in 0..PROFILED {
            let batch = steps.batch((plan.warmup + plan.timed + step) as usize);
            trainer.step(std::slice::from_ref(&batch), plan.learning_rate)?;
        }
        measured.launch_times = LaunchShare::per_step(&gpu.take_profile()?, PROFILED);
    }
    Ok(measured)
}

/// What only grows.
struct Counters {
    cpu_seconds: Option<f64>,
    launches: Option<f64>,
}

impl Counters {
    fn now(device: &Device) -> Self {
        Self {
            cpu_seconds: machine::cpu_seconds(),
            launches: match device {
                Device::Cpu => None,
                Device::Cuda(gpu) => Some(gpu.launches() as f64),
            },
        }
    }
}
