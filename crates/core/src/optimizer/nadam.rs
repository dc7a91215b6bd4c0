use super::adam::{bias, decay, weight_decay};
use super::registry::{Built, Shared};
use super::{Elementwise, Moment, OptimizerChoice, Rule, Step};
use crate::kwargs::Kwargs;
use ferrotune_kernels::adamw::AdamW;
use ferrotune_kernels::optimizer::Rule as Kernel;
use std::sync::{Mutex, PoisonError};

/// NAdam: Adam that looks ahead along its momentum.
///
/// With `mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)` and `M_t` the product of `mu_1` to `mu_t`:
///
/// ```text
/// p <- p - lr (1 - mu_t) / (1 - M_t) * g / d - lr mu_(t+1) / (1 - M_(t+1)) * m / d
/// d  = sqrt(v / (1 - beta2^t)) + eps
/// ```
///
/// # Source
/// Dozat: "Incorporating Nesterov Momentum into Adam" (2016); `torch.optim.NAdam` (2.15).
#[derive(Debug)]
pub struct NAdam {
    constants: AdamW,
    momentum_decay: f64,
    decoupled: bool,
    /// `M_t` of the steps so far: a function of their number, kept because it takes as long as there are steps.
    products: Mutex<Vec<f64>>,
}

impl NAdam {
    /// `decoupled`: whether weight decay shrinks the values instead of joining the gradient.
    #[must_use]
    pub fn new(constants: AdamW, momentum_decay: f64, decoupled: bool) -> Self {
        Self {
            constants,
            momentum_decay,
            decoupled,
            products: Mutex::new(vec![1.0]),
        }
    }

    fn mu(&self, step: u64) -> f64 {
        let fall = 0.96_f64.powf(step as f64 * self.momentum_decay);
        self.constants.beta1 * (1.0 - 0.5 * fall)
    }

    fn product(&self, step: u64) -> f64 {
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = products.last().copied().unwrap_or(1.0);
        for next in products.len() as u64..=step {
            // In f32, as PyTorch has it.
            last = f64::from(last as f32 * self.mu(next) as f32);
            products.push(last);
        }
        products.get(step as usize).copied().unwrap_or(last)
    }
}

/// Factors of [`NAdam`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    beta1: f32,
    beta2: [f32; 2],
    inverse_bias2: f32,
    eps: f32,
    of_gradient: f32,
    of_momentum: f32,
    keep: f32,
    l2: f32,
}

impl Rule for NAdam {
    const KERNEL: Kernel = Kernel::NAdam;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        vec![Moment::signed("exp_avg"), Moment::unsigned("exp_avg_sq")]
    }

    fn scalars(&self, step: Step) -> Scalars {
        let AdamW { beta1, beta2, eps } = self.constants;
        let [keep, l2] = weight_decay(step, self.decoupled);
        let (mu, next) = (self.mu(step.number), self.mu(step.number + 1));
        let product = self.product(step.number);
        Scalars {
            beta1: decay(beta1)[1],
            beta2: decay(beta2),
            inverse_bias2: bias(beta2, step).recip() as f32,
            eps: eps as f32,
            of_gradient: (step.lr * (1.0 - mu) / (1.0 - product)) as f32,
            of_momentum: (step.lr * next / (1.0 - product * next)) as f32,
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
            let denominator = (*v * s.inverse_bias2).sqrt() + s.eps;
            let direction = s.of_gradient * (g / denominator) + s.of_momentum * (*m / denominator);
            *p = *p * s.keep - direction;
        }
    }
}

pub(super) fn build(shared: &Shared, args: &mut Kwargs<'_>) -> Built {
    Ok(OptimizerChoice::per_tensor(Elementwise(NAdam::new(
        shared.adam,
        args.number("momentum_decay", 4e-3)?,
        args.flag("decoupled_weight_decay", false)?,
    ))))
}
