use super::adam::{bias, decay};
use super::registry::{Built, Shared};
use super::{Elementwise, Moment, OptimizerChoice, Rule, Step};
use crate::kwargs::Kwargs;
use ferrotune_kernels::adamw::AdamW;
use ferrotune_kernels::optimizer::Rule as Kernel;

/// Adamax: Adam with the largest magnitude in place of the mean square.
///
/// ```text
/// m <- beta1 m + (1 - beta1) g
/// u <- max(beta2 u, |g| + eps)
/// p <- p - lr / (1 - beta1^t) * m / u
/// ```
///
/// # Source
/// Kingma, Ba: "Adam" (2015), section 7; `torch.optim.Adamax` (2.15).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adamax(pub AdamW);

/// Factors of [`Adamax`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    beta1: f32,
    beta2: f32,
    eps: f32,
    step_size: f32,
    l2: f32,
}

impl Rule for Adamax {
    const KERNEL: Kernel = Kernel::Adamax;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        vec![Moment::signed("exp_avg"), Moment::unsigned("exp_inf")]
    }

    fn scalars(&self, step: Step) -> Scalars {
        let AdamW { beta1, beta2, eps } = self.0;
        Scalars {
            beta1: decay(beta1)[1],
            beta2: beta2 as f32,
            eps: eps as f32,
            step_size: (step.lr / bias(beta1, step)) as f32,
            l2: step.weight_decay as f32,
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let [m, largest, ..] = moments else {
            return;
        };
        let both = m.iter_mut().zip(largest.iter_mut());
        for ((p, g), (m, u)) in values.iter_mut().zip(grad).zip(both) {
            let g = g + s.l2 * *p;
            *m += s.beta1 * (g - *m);
            *u = (*u * s.beta2).max(g.abs() + s.eps);
            *p -= s.step_size * (*m / *u);
        }
    }
}

pub(super) fn build(shared: &Shared, _: &mut Kwargs<'_>) -> Built {
    Ok(OptimizerChoice::per_tensor(Elementwise(Adamax(
        shared.adam,
    ))))
}
