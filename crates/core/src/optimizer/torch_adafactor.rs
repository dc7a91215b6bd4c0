use super::factored::{average, each_matrix, matrix, mean, mean_squares, precondition, rms};
use super::registry::{Built, Shared};
use super::{Gradient, Optimizer, OptimizerChoice, StateSpec, StateValues, Step, Tensor};
use crate::Result;
use crate::kwargs::Kwargs;

/// Adafactor as PyTorch has it: steps of the size of the tensor's values.
///
/// With `w = t^beta2_decay`, of a matrix:
///
/// ```text
/// R <- R + w (mean of g^2 over columns - R), C likewise over rows
/// u  = g / sqrt(max(R C / max(mean(R), eps1), eps1^2))
/// p <- p (1 - lr weight_decay) - max(eps2, rms(p)) min(lr, 1 / sqrt(t)) u / max(1, rms(u) / d)
/// ```
///
/// # Source
/// Shazeer, Stern: "Adafactor" (2018); `torch.optim.Adafactor` (2.15).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TorchAdafactor {
    /// Exponent of the step in the weight of a new second moment.
    pub beta2_decay: f64,
    /// Least second moment, as a root.
    pub eps1: f64,
    /// Least scale of a parameter.
    pub eps2: f64,
    /// Root of the mean square above which an update is scaled down.
    pub d: f64,
}

impl Default for TorchAdafactor {
    fn default() -> Self {
        Self {
            beta2_decay: -0.8,
            eps1: f64::from(f32::EPSILON),
            eps2: 1e-3,
            d: 1.0,
        }
    }
}

impl TorchAdafactor {
    /// The gradient over the root of its second moments.
    fn direction(
        &self,
        shape: &[usize],
        grad: Gradient<'_>,
        state: &mut [StateValues],
        step: Step,
    ) -> Vec<f32> {
        let weight = (step.number as f64).powf(self.beta2_decay);
        let least = (self.eps1 * self.eps1) as f32;
        let inverse_root = |second: f32| second.max(least).sqrt().recip();
        let mut out = vec![0.0; grad.values.len()];
        let Some([rows, cols]) = matrix(shape) else {
            let second = state[0].f32_mut();
            average(
                second,
                grad.iter().map(|g| f64::from(g) * f64::from(g)),
                weight,
            );
            for ((out, g), second) in out.iter_mut().zip(grad.iter()).zip(second) {
                *out = g * inverse_root(*second);
            }
            return out;
        };
        each_matrix(
            [rows, cols],
            &mut out,
            grad,
            state,
            |out, grad, [of_rows, of_cols]| {
                let [row_means, col_means] = mean_squares(grad, [rows, cols]);
                average(of_rows, row_means, weight);
                average(of_cols, col_means, weight);
                let mean = mean(of_rows).max(self.eps1) as f32;
                let relative: Vec<f32> = of_rows.iter().map(|value| value / mean).collect();
                precondition(out, grad, [&relative, of_cols], |r, c| inverse_root(r * c));
            },
        );
        out
    }
}

impl Optimizer for TorchAdafactor {
    fn state(&self, shape: &[usize]) -> Vec<StateSpec> {
        match shape {
            [batch @ .., rows, cols] => vec![
                StateSpec::f32("row_var", [batch, &[*rows]].concat()),
                StateSpec::f32("col_var", [batch, &[*cols]].concat()),
            ],
            _ => vec![StateSpec::f32("variance", shape)],
        }
    }

    fn update(&self, tensor: Tensor<'_>, state: &mut [StateValues], step: Step) -> Result<()> {
        let rate = step.lr.min((step.number as f64).sqrt().recip());
        let size = rms(tensor.values).max(self.eps2) * rate;
        let update = self.direction(tensor.shape, tensor.grad, state, step);
        let factor = (size / (rms(&update) / self.d).max(1.0)) as f32;
        let keep = (1.0 - step.lr * step.weight_decay) as f32;
        for (value, update) in tensor.values.iter_mut().zip(update) {
            *value = *value * keep - factor * update;
        }
        Ok(())
    }

    fn scratch_bytes(&self, shape: &[usize]) -> u64 {
        4 * shape.iter().product::<usize>() as u64
    }
}

pub(super) fn build(_: &Shared, args: &mut Kwargs<'_>) -> Built {
    let standard = TorchAdafactor::default();
    Ok(OptimizerChoice::per_tensor(TorchAdafactor {
        beta2_decay: args.negative("beta2_decay", standard.beta2_decay)?,
        eps1: args.number("eps1", standard.eps1)?,
        eps2: args.number("eps2", standard.eps2)?,
        d: args.positive("d", standard.d)?,
    }))
}
