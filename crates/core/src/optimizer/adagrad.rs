use super::registry::{Built, Shared};
use super::{Elementwise, Moment, OptimizerChoice, Rule, Step};
use crate::kwargs::Kwargs;
use ferrotune_kernels::optimizer::Rule as Kernel;

/// Adagrad: the gradient over the root of the sum of all its squares.
///
/// ```text
/// g <- g + weight_decay * p
/// s <- s + g^2
/// p <- p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)
/// ```
///
/// # Source
/// Duchi et al. (2011); `torch.optim.Adagrad` (2.15).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adagrad {
    /// How fast the learning rate falls with the steps.
    pub lr_decay: f64,
    /// Added to the root.
    pub eps: f64,
    /// The sum before the first step.
    pub initial_accumulator_value: f64,
}

impl Default for Adagrad {
    fn default() -> Self {
        Self {
            lr_decay: 0.0,
            eps: 1e-10,
            initial_accumulator_value: 0.0,
        }
    }
}

/// Factors of [`Adagrad`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    lr: f32,
    l2: f32,
    eps: f32,
    start: f32,
}

impl Rule for Adagrad {
    const KERNEL: Kernel = Kernel::Adagrad;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        vec![Moment::signed("sum")]
    }

    fn scalars(&self, step: Step) -> Scalars {
        let first = step.number == 1;
        Scalars {
            lr: (step.lr / (1.0 + (step.number - 1) as f64 * self.lr_decay)) as f32,
            l2: step.weight_decay as f32,
            eps: self.eps as f32,
            start: if first {
                self.initial_accumulator_value as f32
            } else {
                0.0
            },
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let [sum, ..] = moments else {
            return;
        };
        for ((p, g), sum) in values.iter_mut().zip(grad).zip(sum.iter_mut()) {
            let g = g + s.l2 * *p;
            *sum += s.start + g * g;
            *p -= s.lr * (g / (sum.sqrt() + s.eps));
        }
    }
}

pub(super) fn build(_: &Shared, args: &mut Kwargs<'_>) -> Built {
    let standard = Adagrad::default();
    Ok(OptimizerChoice::per_tensor(Elementwise(Adagrad {
        lr_decay: args.number("lr_decay", standard.lr_decay)?,
        eps: args.number("eps", standard.eps)?,
        initial_accumulator_value: args.number("initial_accumulator_value", 0.0)?,
    })))
}
