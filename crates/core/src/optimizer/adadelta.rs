use super::adam::decay;
use super::registry::{Built, Shared};
use super::{Elementwise, Moment, OptimizerChoice, Rule, Step};
use crate::kwargs::Kwargs;
use ferrotune_kernels::optimizer::Rule as Kernel;

/// Adadelta: steps of the size of the last ones.
///
/// ```text
/// g <- g + weight_decay * p
/// v <- rho v + (1 - rho) g^2
/// u  = sqrt(a + eps) / sqrt(v + eps) * g
/// a <- rho a + (1 - rho) u^2
/// p <- p - lr * u
/// ```
///
/// # Source
/// Zeiler (2012); `torch.optim.Adadelta` (2.15).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adadelta {
    /// Decay of both mean squares.
    pub rho: f64,
    /// Added to both.
    pub eps: f64,
}

impl Default for Adadelta {
    fn default() -> Self {
        Self {
            rho: 0.9,
            eps: 1e-6,
        }
    }
}

/// Factors of [`Adadelta`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    rho: [f32; 2],
    eps: f32,
    lr: f32,
    l2: f32,
}

impl Rule for Adadelta {
    const KERNEL: Kernel = Kernel::Adadelta;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        vec![
            Moment::unsigned("square_avg"),
            Moment::unsigned("acc_delta"),
        ]
    }

    fn scalars(&self, step: Step) -> Scalars {
        Scalars {
            rho: decay(self.rho),
            eps: self.eps as f32,
            lr: step.lr as f32,
            l2: step.weight_decay as f32,
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let [square, delta, ..] = moments else {
            return;
        };
        let both = square.iter_mut().zip(delta.iter_mut());
        for ((p, g), (v, a)) in values.iter_mut().zip(grad).zip(both) {
            let g = g + s.l2 * *p;
            *v = *v * s.rho[0] + g * g * s.rho[1];
            let update = (*a + s.eps).sqrt() / (*v + s.eps).sqrt() * g;
            *a = *a * s.rho[0] + update * update * s.rho[1];
            *p -= s.lr * update;
        }
    }
}

pub(super) fn build(_: &Shared, args: &mut Kwargs<'_>) -> Built {
    let standard = Adadelta::default();
    Ok(OptimizerChoice::per_tensor(Elementwise(Adadelta {
        rho: args.share("rho", standard.rho)?,
        eps: args.number("eps", standard.eps)?,
    })))
}
