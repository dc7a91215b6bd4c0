//! Clipping and AdamW over the flat buffers, on a CPU or a GPU.

use crate::Result;
use crate::params::{FlatBuffer, ParamLayout};
use ferrotune_kernels::Device;
use ferrotune_kernels::adamw::cuda::{Settings, Update};
use ferrotune_kernels::adamw::{self, Group};
use ferrotune_kernels::linear_cross_entropy::{Accumulator, Sums};

/// What a step reads and writes, of one layout.
pub(super) struct Buffers<'a> {
    pub(super) params: &'a mut FlatBuffer,
    pub(super) grads: &'a mut FlatBuffer,
    pub(super) exp_avg: &'a mut FlatBuffer,
    pub(super) exp_avg_sq: &'a mut FlatBuffer,
}

/// Room for a step's scalars on a GPU; `None` on a CPU.
pub(super) fn scalars(device: &Device, layout: &ParamLayout) -> Option<Update> {
    match device {
        Device::Cpu => None,
        Device::Cuda(device) => {
            let segments = layout.physical().count();
            Some(Update::new(device, layout.len(), segments.max(1)))
        }
    }
}

/// Divides and clips the gradient if its norm is finite, on the host; returns the norm before that.
pub(super) fn clip(settings: &Settings, grads: &mut FlatBuffer) -> f64 {
    let grads = grads.as_mut_slice();
    let norm = adamw::global_norm(grads) / settings.divisor;
    if norm.is_finite() {
        let factor = (clip_factor(settings.max_norm, norm) / settings.divisor) as f32;
        grads.iter_mut().for_each(|g| *g *= factor);
    }
    norm
}

/// Divides, clips and applies the gradient if its norm is finite; returns the norm.
pub(super) fn on_host(settings: &Settings, groups: &[Group], buffers: Buffers<'_>) -> Result<f64> {
    let Buffers {
        params,
        grads,
        exp_avg,
        exp_avg_sq,
    } = buffers;
    let norm = adamw::global_norm(grads.as_slice()) / settings.divisor;
    if !norm.is_finite() {
        return Ok(norm);
    }
    adamw::step(
        &settings.adamw,
        params.as_mut_slice(),
        grads.as_slice(),
        (clip_factor(settings.max_norm, norm) / settings.divisor) as f32,
        exp_avg.as_mut_slice(),
        exp_avg_sq.as_mut_slice(),
        groups,
    )?;
    Ok(norm)
}

/// [`on_host`], with nothing waited for before the end; the loss in `sums` must be finite too. Returns
/// those as well: a step waits for a GPU once.
pub(super) fn on_gpu(
    update: &mut Update,
    settings: &Settings,
    groups: &[Group],
    buffers: Buffers<'_>,
    sums: &Accumulator,
) -> Result<(f64, Sums)> {
    let Buffers {
        params,
        grads,
        exp_avg,
        exp_avg_sq,
    } = buffers;
    update.set(settings, groups)?;
    update.norm_and_scale(grads.home(), Some(sums))?;
    let (params, shadow) = params.home_and_rounded_mut();
    let buffers = adamw::cuda::Buffers {
        params,
        grads: grads.home_mut(),
        m: exp_avg.home_mut(),
        v: exp_avg_sq.home_mut(),
        shadow,
    };
    update.step(buffers, false)?;
    let (outcome, sums) = update.read_with(sums)?;
    Ok((outcome.norm, sums))
}

/// torch.nn.utils.clip_grad_norm_: `max_norm / (norm + 1e-6)`, at most 1.
pub(super) fn clip_factor(max_norm: Option<f64>, norm: f64) -> f64 {
    max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0))
}
