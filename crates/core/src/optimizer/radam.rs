use super::adam::{bias, decay, weight_decay};
use super::registry::{Built, Shared};
use super::{Elementwise, Moment, OptimizerChoice, Rule, Step};
use crate::kwargs::Kwargs;
use ferrotune_kernels::adamw::AdamW;
use ferrotune_kernels::optimizer::Rule as Kernel;

/// `RAdam`: Adam without the second moment while few steps make it uncertain, then scaled by how certain it is.
///
/// With `n_inf = 2 / (1 - beta2) - 1` and `n = n_inf - 2 t beta2^t / (1 - beta2^t)`:
///
/// ```text
/// n <= 5:  p <- p - lr * m / (1 - beta1^t)
/// else:    p <- p - lr * m / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v) + eps) * r
/// r = sqrt((n - 4) (n - 2) n_inf / ((n_inf - 4) (n_inf - 2) n))
/// ```
///
/// # Source
/// Liu et al.: "On the Variance of the Adaptive Learning Rate and Beyond" (2020); `torch.optim.RAdam` (2.15).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RAdam {
    /// Decays of both moments, and what is added to the root of the second.
    pub constants: AdamW,
    /// Whether weight decay shrinks the values instead of joining the gradient.
    pub decoupled: bool,
}

/// Factors of [`RAdam`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    beta1: f32,
    beta2: [f32; 2],
    eps: f32,
    step_size: f32,
    /// Whether there are steps enough for `rectified`, what the root of the second moment is divided into.
    is_rectified: u32,
    rectified: f32,
    keep: f32,
    l2: f32,
}

impl Rule for RAdam {
    const KERNEL: Kernel = Kernel::RAdam;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        vec![Moment::signed("exp_avg"), Moment::unsigned("exp_avg_sq")]
    }

    fn scalars(&self, step: Step) -> Scalars {
        let AdamW { beta1, beta2, eps } = self.constants;
        let [keep, l2] = weight_decay(step, self.decoupled);
        let (t, bias2) = (step.number as f64, bias(beta2, step));
        let most = 2.0 / (1.0 - beta2) - 1.0;
        let length = most - 2.0 * t * beta2.powf(t) / bias2;
        let rectified = || {
            let ratio =
                (length - 4.0) * (length - 2.0) * most / ((most - 4.0) * (most - 2.0) * length);
            (ratio.sqrt() * bias2.sqrt()) as f32
        };
        Scalars {
            beta1: decay(beta1)[1],
            beta2: decay(beta2),
            eps: eps as f32,
            step_size: (step.lr / bias(beta1, step)) as f32,
            is_rectified: u32::from(length > 5.0),
            rectified: if length > 5.0 { rectified() } else { 1.0 },
            keep,
            l2,
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let [m, v, ..] = moments else {
            return;
        };
        let both = m.iter_mut().zip(v.iter_mut());
        for ((p, g), (m, v)) in values.iter_mut().zip(grad).zip(both) {
            let g = g + s.l2 * *p;
            *m += s.beta1 * (g - *m);
            *v = *v * s.beta2[0] + g * g * s.beta2[1];
            let factor = if s.is_rectified == 1 {
                s.rectified / (v.sqrt() + s.eps)
            } else {
                1.0
            };
            *p = *p * s.keep - *m * s.step_size * factor;
        }
    }
}

pub(super) fn build(shared: &Shared, args: &mut Kwargs<'_>) -> Built {
    Ok(OptimizerChoice::per_tensor(Elementwise(RAdam {
        constants: shared.adam,
        decoupled: args.flag("decoupled_weight_decay", false)?,
    })))
}
