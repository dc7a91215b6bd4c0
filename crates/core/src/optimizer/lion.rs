use super::adam::decay;
use super::registry::Shared;
use super::{Moment, Rule, Step};
use ferrotune_kernels::optimizer::Rule as Kernel;

/// Lion: the sign of an average of momentum and gradient.
///
/// ```text
/// p <- p (1 - lr weight_decay) - lr * sign(beta1 m + (1 - beta1) g)
/// m <- beta2 m + (1 - beta2) g
/// ```
///
/// # Source
/// Chen et al.: "Symbolic Discovery of Optimization Algorithms" (2023); `bitsandbytes.optim.Lion` (0.50).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Share of the momentum in the direction.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
}

/// Factors of [`Lion`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    beta1: [f32; 2],
    beta2: [f32; 2],
    lr: f32,
    keep: f32,
}

impl Rule for Lion {
    const KERNEL: Kernel = Kernel::Lion;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        vec![Moment::signed("exp_avg")]
    }

    fn scalars(&self, step: Step) -> Scalars {
        Scalars {
            beta1: decay(self.beta1),
            beta2: decay(self.beta2),
            lr: step.lr as f32,
            keep: (1.0 - step.lr * step.weight_decay) as f32,
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let [m, ..] = moments else {
            return;
        };
        for ((p, g), m) in values.iter_mut().zip(grad).zip(m.iter_mut()) {
            let direction = *m * s.beta1[0] + g * s.beta1[1];
            // Of zero it is zero, where `signum` has 1.
            let sign = if direction == 0.0 {
                0.0
            } else {
                direction.signum()
            };
            *p = *p * s.keep - s.lr * sign;
            *m = *m * s.beta2[0] + g * s.beta2[1];
        }
    }
}

/// With the betas that Transformers passes.
pub(super) fn rule(shared: &Shared) -> Lion {
    Lion {
        beta1: shared.adam.beta1,
        beta2: shared.adam.beta2,
    }
}
