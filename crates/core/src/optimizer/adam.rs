use super::registry::{Built, Shared};
use super::{Elementwise, Moment, OptimizerChoice, Rule, Step};
use crate::Result;
use crate::kwargs::Kwargs;
use ferrotune_kernels::adamw::AdamW;
use ferrotune_kernels::optimizer::Rule as Kernel;

/// Adam, with weight decay as a part of the gradient or, as AdamW, apart from it.
///
/// ```text
/// m <- beta1 m + (1 - beta1) g
/// v <- beta2 v + (1 - beta2) g^2
/// p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
/// ```
///
/// # Source
/// Kingma, Ba: "Adam" (2015); Reddi et al.: "On the Convergence of Adam and Beyond" (2018) for `amsgrad`;
/// `torch.optim.Adam` and `AdamW` (2.15). `bitsandbytes.optim.Adam` and `AdamW` (0.50) are the decoupled one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Decays of both moments, and what is added to the root of the second.
    pub constants: AdamW,
    /// The largest second moment so far in place of the last.
    pub amsgrad: bool,
    /// Whether weight decay shrinks the values instead of joining the gradient.
    pub decoupled: bool,
}

/// Factors of [`Adam`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    beta1: [f32; 2],
    beta2: [f32; 2],
    inverse_root_bias2: f32,
    eps: f32,
    step_size: f32,
    keep: f32,
    l2: f32,
}

/// `beta` and `1 - beta`.
pub(super) fn decay(beta: f64) -> [f32; 2] {
    [beta as f32, (1.0 - beta) as f32]
}

/// `1 - beta^t`.
pub(super) fn bias(beta: f64, step: Step) -> f64 {
    1.0 - beta.powf(step.number as f64)
}

/// What decoupled weight decay leaves of a value, and the share of it that joins the gradient otherwise.
pub(super) fn weight_decay(step: Step, decoupled: bool) -> [f32; 2] {
    if decoupled {
        [(1.0 - step.lr * step.weight_decay) as f32, 0.0]
    } else {
        [1.0, step.weight_decay as f32]
    }
}

impl Rule for Adam {
    const KERNEL: Kernel = Kernel::Adam;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        let mut moments = vec![Moment::signed("exp_avg"), Moment::unsigned("exp_avg_sq")];
        if self.amsgrad {
            moments.push(Moment::unsigned("max_exp_avg_sq"));
        }
        moments
    }

    fn scalars(&self, step: Step) -> Scalars {
        let AdamW { beta1, beta2, eps } = self.constants;
        let [keep, l2] = weight_decay(step, self.decoupled);
        Scalars {
            beta1: decay(beta1),
            beta2: decay(beta2),
            inverse_root_bias2: bias(beta2, step).sqrt().recip() as f32,
            eps: eps as f32,
            step_size: (step.lr / bias(beta1, step)) as f32,
            keep,
            l2,
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let [m, v, largest @ ..] = moments else {
            return;
        };
        let mut largest = largest.first_mut();
        let both = m.iter_mut().zip(v.iter_mut());
        for (i, ((p, g), (m, v))) in values.iter_mut().zip(grad).zip(both).enumerate() {
            let g = g + s.l2 * *p;
            *m = *m * s.beta1[0] + g * s.beta1[1];
            *v = *v * s.beta2[0] + g * g * s.beta2[1];
            let second = match &mut largest {
                None => *v,
                Some(largest) => {
                    largest[i] = largest[i].max(*v);
                    largest[i]
                }
            };
            let denominator = second.sqrt() * s.inverse_root_bias2 + s.eps;
            *p = *p * s.keep - s.step_size * (*m / denominator);
        }
    }
}

/// AdamW: the kernel, unless `amsgrad` is asked for.
pub(super) fn adamw(shared: &Shared, args: &mut Kwargs<'_>) -> Built {
    let adam = read(shared, args, true)?;
    Ok(if adam.amsgrad {
        OptimizerChoice::per_tensor(Elementwise(adam))
    } else {
        OptimizerChoice::AdamW(adam.constants)
    })
}

/// Adam with L2 regularisation.
pub(super) fn adam(shared: &Shared, args: &mut Kwargs<'_>) -> Built {
    Ok(OptimizerChoice::per_tensor(Elementwise(read(
        shared, args, false,
    )?)))
}

fn read(shared: &Shared, args: &mut Kwargs<'_>, decoupled: bool) -> Result<Adam> {
    Ok(Adam {
        constants: shared.adam,
        amsgrad: args.flag("amsgrad", false)?,
        decoupled,
    })
}

/// AdamW as bitsandbytes has it.
pub(super) fn of_bitsandbytes(shared: &Shared) -> Adam {
    Adam {
        constants: shared.adam,
        amsgrad: false,
        decoupled: true,
    }
}
