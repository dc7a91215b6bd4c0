use super::adam::decay;
use super::registry::{Built, Shared};
use super::{Elementwise, Moment, OptimizerChoice, Rule, Step};
use crate::Result;
use crate::kwargs::Kwargs;
use ferrotune_kernels::optimizer::Rule as Kernel;

/// RMSprop: the gradient over the root of its mean square.
///
/// ```text
/// g <- g + weight_decay * p
/// v <- alpha * v + (1 - alpha) g^2
/// a <- alpha * a + (1 - alpha) g                                  where centered
/// u <- g / (sqrt(v - a^2) + eps)
/// b <- momentum * b + u, p <- p - lr * b; without momentum p <- p - lr * u
/// ```
///
/// # Source
/// `torch.optim.RMSprop` (2.15); `bitsandbytes.optim.RMSprop` (0.50) without centering and momentum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsProp {
    /// Decay of the mean square.
    pub alpha: f64,
    /// Added to its root.
    pub eps: f64,
    /// Share of the last steps' direction; 0 for none.
    pub momentum: f64,
    /// The variance in place of the mean square.
    pub centered: bool,
}

impl Default for RmsProp {
    fn default() -> Self {
        Self {
            alpha: 0.99,
            eps: 1e-8,
            momentum: 0.0,
            centered: false,
        }
    }
}

/// Factors of [`RmsProp`].
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Scalars {
    alpha: [f32; 2],
    eps: f32,
    lr: f32,
    l2: f32,
    momentum: f32,
    centered: u32,
}

impl Rule for RmsProp {
    const KERNEL: Kernel = Kernel::RmsProp;
    type Scalars = Scalars;

    fn moments(&self) -> Vec<Moment> {
        // Signed in 8 bits, as bitsandbytes has the state of every optimizer with one.
        let mut moments = vec![Moment::signed("square_avg")];
        if self.centered {
            moments.push(Moment::signed("grad_avg"));
        }
        if self.momentum > 0.0 {
            moments.push(Moment::signed("momentum_buffer"));
        }
        moments
    }

    fn scalars(&self, step: Step) -> Scalars {
        Scalars {
            alpha: decay(self.alpha),
            eps: self.eps as f32,
            lr: step.lr as f32,
            l2: step.weight_decay as f32,
            momentum: self.momentum as f32,
            centered: u32::from(self.centered),
        }
    }

    fn update(s: &Scalars, values: &mut [f32], grad: &[f32], moments: &mut [&mut [f32]]) {
        let [square, rest @ ..] = moments else {
            return;
        };
        let (mut mean, mut buffer) = match rest {
            [mean, buffer] => (Some(mean), Some(buffer)),
            [one] if s.centered == 1 => (Some(one), None),
            [one] => (None, Some(one)),
            _ => (None, None),
        };
        for (i, ((p, g), v)) in values
            .iter_mut()
            .zip(grad)
            .zip(square.iter_mut())
            .enumerate()
        {
            let g = g + s.l2 * *p;
            *v = *v * s.alpha[0] + g * g * s.alpha[1];
            let mut variance = *v;
            if let Some(mean) = &mut mean {
                mean[i] += s.alpha[1] * (g - mean[i]);
                variance -= mean[i] * mean[i];
            }
            // Rounding can take the mean square below the square of the mean; PyTorch has NaN there.
            let update = g / (variance.max(0.0).sqrt() + s.eps);
            let direction = match &mut buffer {
                None => update,
                Some(buffer) => {
                    buffer[i] = buffer[i] * s.momentum + update;
                    buffer[i]
                }
            };
            *p -= s.lr * direction;
        }
    }
}

pub(super) fn build(_: &Shared, args: &mut Kwargs<'_>) -> Built {
    let plain = of_bitsandbytes(args)?;
    Ok(OptimizerChoice::per_tensor(Elementwise(RmsProp {
        momentum: args.number("momentum", 0.0)?,
        centered: args.flag("centered", false)?,
        ..plain
    })))
}

/// Without momentum and centering.
pub(super) fn of_bitsandbytes(args: &mut Kwargs<'_>) -> Result<RmsProp> {
    let standard = RmsProp::default();
    Ok(RmsProp {
        alpha: args.share("alpha", standard.alpha)?,
        eps: args.number("eps", standard.eps)?,
        ..standard
    })
}
