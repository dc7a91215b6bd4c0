//! How fast a group sums.

use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::Device;
use std::time::Instant;

/// Exchanges before the timed ones: connections reach their speed.
const WARM_UP: usize = 5;

/// Seconds of each of `repeats` all-reduces of `bytes` (rounded up to whole f32), as this rank sees them.
///
/// Every rank of the group calls this with the same arguments. The buffer is at home on `device`. Sums are checked.
///
/// # Errors
/// What the group's exchanges fail with; [`Error::Numeric`] if a sum is wrong.
pub fn measure_all_reduce(
    group: &mut dyn ProcessGroup,
    device: &Device,
    bytes: usize,
    repeats: usize,
) -> Result<Vec<f64>> {
    let mut layout = ParamLayoutBuilder::new();
    layout.add(ParamSpec::new("values", [bytes.div_ceil(4)], 0));
    let mut buffer = FlatBuffer::zeros_on(&layout.build()?, device);
    let world = group.world_size();
    let mut times = Vec::with_capacity(repeats);
    for round in 0..WARM_UP + repeats {
        let value = (group.rank() + round) as f32;
        buffer.as_mut_slice().fill(value);
        // There before the clock starts.
        let _ = buffer.home();
        device.synchronize()?;
        group.barrier()?;
        let begin = Instant::now();
        group.all_reduce(&mut buffer, &mut [])?;
        device.synchronize()?;
        let seconds = begin.elapsed().as_secs_f64();
        // Small whole numbers: the sum is exact in any order.
        let sum = (world * (world - 1) / 2 + world * round) as f32;
        if let Some(wrong) = buffer.as_slice().iter().position(|v| *v != sum) {
            let got = buffer.as_slice()[wrong];
            let message = format!("all_reduce: value {wrong} is {got}, expected {sum}");
            return Err(Error::Numeric { message });
        }
        if round >= WARM_UP {
            times.push(seconds);
        }
    }
    Ok(times)
}
