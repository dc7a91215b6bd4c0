//! What the operating system says of this process. `None` where it has no `/proc`.

use ferrotune::core::Result;
use ferrotune::kernels::{DType, Device, Tensor, matmul, rng};
use std::fs;
use std::time::Instant;

/// Linux reports process times in hundredths of a second, whatever the kernel's own tick.
const TICKS_PER_SECOND: f64 = 100.0;

/// Side of the square product that measures a CPU's peak, and a GPU's.
const PEAK_SIDES: [usize; 2] = [2048, 8192];
const PEAK_REPEATS: usize = 8;

/// Resident memory now, in bytes.
pub(super) fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// Largest resident memory since the start, or since [`reset_peak`], in bytes.
pub(super) fn peak_resident_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// Lets [`peak_resident_bytes`] begin anew from what is resident now.
pub(super) fn reset_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Seconds since the kernel started this process, to a hundredth.
pub(super) fn seconds_since_exec() -> Option<f64> {
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Some(uptime - stat(21)? / TICKS_PER_SECOND)
}

/// Processor time of all threads so far, in seconds.
pub(super) fn cpu_seconds() -> Option<f64> {
    Some((stat(13)? + stat(14)?) / TICKS_PER_SECOND)
}

/// Bytes of GPU memory that are taken, by this process or another; `None` on a CPU.
///
/// # Errors
/// The first failure of the device.
pub(super) fn gpu_taken(device: &Device) -> Result<Option<u64>> {
    let Device::Cuda(gpu) = device else {
        return Ok(None);
    };
    let memory = gpu.memory_info()?;
    Ok(Some((memory.total - memory.free) as u64))
}

/// The best rate of a large square product on random values.
#[derive(Clone, Debug)]
pub(super) struct Peak {
    /// Per second.
    pub(super) flops: f64,
    /// The product, in words.
    pub(super) what: String,
}

/// Measures [`Peak`] on all of `device`.
///
/// # Errors
/// If the product cannot be computed there.
pub(super) fn gemm_peak(device: &Device, dtype: DType) -> Result<Peak> {
    let side = PEAK_SIDES[usize::from(device.is_cuda())];
    let random = |name: &str| {
        let mut stream = rng::Stream::new(rng::key_for(0, name));
        let values = (0..side * side).map(|_| stream.uniform() as f32 - 0.5);
        let values = Tensor::from_f32(values.collect(), side, side);
        values.to_dtype(dtype).to_device(device)
    };
    let (a, b) = (random("a"), random("b"));
    let mut product = Tensor::zeros(dtype, side, side).to_device(device);
    let mut best = f64::INFINITY;
    device.synchronize()?;
    for _ in 0..PEAK_REPEATS {
        let begin = Instant::now();
        matmul::nt(product.view_mut(), 0.0, 1.0, a.view(), b.view())?;
        device.synchronize()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(Peak {
        flops: 2.0 * (side as f64).powi(3) / best,
        what: format!("{dtype} product of {side} x {side}"),
    })
}

fn status(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// Field `index` (from 0) of `/proc/self/stat`, one after the process name.
fn stat(index: usize) -> Option<f64> {
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in parentheses, may hold spaces; it is field 1.
    let (_, after_name) = text.rsplit_once(')')?;
    after_name.split_whitespace().nth(index - 2)?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn memory_and_times_of_this_process_are_read() {
        let (now, peak) = (resident_bytes(), peak_resident_bytes());
        assert!(now > Some(1 << 20) && peak >= now, "{now:?} {peak:?}");
        let age = seconds_since_exec().expect("a /proc");
        assert!((0.0..3600.0).contains(&age), "{age}");
        assert!(cpu_seconds().expect("a /proc") >= 0.0);
    }
}
