use super::registry::{Built, Shared};
use super::{Elementwise, Moment, OptimizerChoice, Rule, Step};
use crate::kwargs::Kwargs;
use ferrotune_kernels::optimizer::Rule as Kernel;

/// Stochastic gradient descent, with momentum or without.
///
/// ```text
/// g <- g + weight_decay * p
/// b <- g in the first step, then momentum * b + (1 - dampening) g
/// p <- p - lr * b, with nesterov p - lr * (g + momentum * b)
/// ```
///
/// # Source
/// `torch.optim.SGD` (2.15).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sgd {
    /// Share of the last steps' direction; 0 for none.
    pub momentum: f64,
    /// What is taken off the gradient beside it.
    pub dampening: f64,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
}

/// Factors of [`Sgd`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    lr: f32,
    l2: f32,
    momentum: f32,
    fresh: f32,
    nesterov: u32,
}

impl Rule for Sgd {
    const KERNEL: Kernel = Kernel::Sgd;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        if self.momentum == 0.0 {
            return Vec::new();
        }
        vec![Moment::signed("momentum_buffer")]
    }

    fn scalars(&self, step: Step) -> Scalars {
        let first = step.number == 1;
        Scalars {
            lr: step.lr as f32,
            l2: step.weight_decay as f32,
            momentum: self.momentum as f32,
            fresh: if first { 1.0 } else { 1.0 - self.dampening } as f32,
            nesterov: u32::from(self.nesterov),
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let Some(buffer) = moments.first_mut() else {
            for (p, g) in values.iter_mut().zip(grad) {
                *p -= s.lr * (g + s.l2 * *p);
            }
            return;
        };
        for ((p, g), b) in values.iter_mut().zip(grad).zip(buffer.iter_mut()) {
            let g = g + s.l2 * *p;
            *b = *b * s.momentum + g * s.fresh;
            let direction = if s.nesterov == 1 {
                g + s.momentum * *b
            } else {
                *b
            };
            *p -= s.lr * direction;
        }
    }
}

pub(super) fn build(_: &Shared, args: &mut Kwargs<'_>) -> Built {
    let sgd = Sgd {
        momentum: args.number("momentum", 0.0)?,
        dampening: args.number("dampening", 0.0)?,
        nesterov: args.flag("nesterov", false)?,
    };
    if sgd.nesterov && (sgd.momentum == 0.0 || sgd.dampening != 0.0) {
        return Err(args.error("nesterov", "needs a momentum above 0 and no dampening"));
    }
    Ok(OptimizerChoice::per_tensor(Elementwise(sgd)))
}
