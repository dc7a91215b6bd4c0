use super::adam::{bias, decay};
use super::registry::Shared;
use super::{Moment, Rule, Step};
use crate::Result;
use crate::kwargs::Kwargs;
use ferrotune_kernels::adamw::AdamW;
use ferrotune_kernels::optimizer::Rule as Kernel;

/// `AdEMAMix`: `AdamW` with a second, much slower momentum.
///
/// ```text
/// m <- beta1 m + (1 - beta1) g
/// s <- beta3 s + (1 - beta3) g
/// v <- beta2 v + (1 - beta2) g^2
/// p <- p (1 - lr weight_decay) - lr (m / (1 - beta1^t) + alpha s) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
/// ```
///
/// # Source
/// Pagliardini et al.: "The AdEMAMix Optimizer: Better, Faster, Older" (2024); `bitsandbytes.optim.AdEMAMix`
/// (0.50), with its warm-ups of alpha and beta3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdEmaMix {
    /// Decays of the fast momentum and the second moment, and what is added to the root of the latter.
    pub constants: AdamW,
    /// Decay of the slow momentum.
    pub beta3: f64,
    /// Weight of the slow momentum.
    pub alpha: f64,
    /// Steps over which alpha grows from 0.
    pub t_alpha: Option<u64>,
    /// Steps over which beta3 grows from beta1.
    pub t_beta3: Option<u64>,
}

/// Factors of [`AdEmaMix`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    beta1: [f32; 2],
    beta2: [f32; 2],
    beta3: [f32; 2],
    alpha: f32,
    inverse_bias1: f32,
    inverse_root_bias2: f32,
    eps: f32,
    lr: f32,
    keep: f32,
}

impl AdEmaMix {
    fn alpha(&self, step: f64) -> f64 {
        let grown = |steps: u64| (step * self.alpha / steps as f64).min(self.alpha);
        self.t_alpha.map_or(self.alpha, grown)
    }

    fn beta3(&self, step: f64) -> f64 {
        let grown = |steps: u64| {
            let [fast, slow] = [self.constants.beta1.ln(), self.beta3.ln()];
            let share = step / steps as f64;
            let halfway = fast * slow / ((1.0 - share) * slow + share * fast);
            halfway.exp().min(self.beta3)
        };
        self.t_beta3.map_or(self.beta3, grown)
    }
}

impl Rule for AdEmaMix {
    const KERNEL: Kernel = Kernel::AdEmaMix;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        vec![
            Moment::signed("exp_avg"),
            Moment::signed("exp_avg_slow"),
            Moment::unsigned("exp_avg_sq"),
        ]
    }

    fn scalars(&self, step: Step) -> Scalars {
        let AdamW { beta1, beta2, eps } = self.constants;
        let t = step.number as f64;
        Scalars {
            beta1: decay(beta1),
            beta2: decay(beta2),
            beta3: decay(self.beta3(t)),
            alpha: self.alpha(t) as f32,
            inverse_bias1: bias(beta1, step).recip() as f32,
            inverse_root_bias2: bias(beta2, step).sqrt().recip() as f32,
            eps: eps as f32,
            lr: step.lr as f32,
            keep: (1.0 - step.lr * step.weight_decay) as f32,
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let [fast, slow, v, ..] = moments else {
            return;
        };
        let momenta = fast.iter_mut().zip(slow.iter_mut());
        let all = momenta.zip(v.iter_mut());
        for ((p, g), ((m, slow), v)) in values.iter_mut().zip(grad).zip(all) {
            *m = *m * s.beta1[0] + g * s.beta1[1];
            *slow = *slow * s.beta3[0] + g * s.beta3[1];
            *v = *v * s.beta2[0] + g * g * s.beta2[1];
            let mixed = *m * s.inverse_bias1 + s.alpha * *slow;
            let denominator = v.sqrt() * s.inverse_root_bias2 + s.eps;
            *p = *p * s.keep - s.lr * (mixed / denominator);
        }
    }
}

/// With what Transformers passes; `optim_args` come before the `adam_*` keys.
pub(super) fn rule(shared: &Shared, args: &mut Kwargs<'_>) -> Result<AdEmaMix> {
    Ok(AdEmaMix {
        constants: AdamW {
            beta1: args.share("beta1", shared.adam.beta1)?,
            beta2: args.share("beta2", shared.adam.beta2)?,
            eps: args.number("eps", shared.adam.eps)?,
        },
        beta3: args.share("beta3", 0.9999)?,
        alpha: args.number("alpha", 5.0)?,
        t_alpha: args.count("t_alpha")?,
        t_beta3: args.count("t_beta3")?,
    })
}
