use super::factored::{average, each_matrix, matrix, mean, mean_squares, precondition, rms};
use super::registry::{Built, Shared};
use super::{Gradient, Optimizer, OptimizerChoice, StateSpec, StateValues, Step, Tensor};
use crate::Result;
use crate::kwargs::Kwargs;

/// What [`Adafactor`] takes for its learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LearningRate {
    /// That of the step.
    Given,
    /// The inverse root of the number of steps, at most 0.01.
    Relative,
    /// The same, growing from 0 by 1e-6 a step.
    RelativeWithWarmup,
}

/// Adafactor as Transformers has it: second moments of a matrix are the product of one vector for its rows and
/// one for its columns.
///
/// With `w = t^decay_rate`, of a matrix:
///
/// ```text
/// R <- R + w (mean of g^2 + eps1 over columns - R), C likewise over rows
/// u  = g / sqrt(R C / mean(R)), and u / max(1, rms(u) / clip_threshold)
/// lr = learning rate, times max(eps2, rms(p)) with scale_parameter
/// m <- beta1 m + (1 - beta1) lr u, or lr u without beta1
/// p <- p (1 - weight_decay lr) - m
/// ```
///
/// # Source
/// Shazeer, Stern: "Adafactor" (2018); `transformers.optimization.Adafactor` (5.24).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// Added to squares, and the least scale of a parameter.
    pub eps: [f64; 2],
    /// Root of the mean square above which an update is scaled down.
    pub clip_threshold: f64,
    /// Exponent of the step in the weight of a new second moment.
    pub decay_rate: f64,
    /// Decay of the first moment; `None` for none.
    pub beta1: Option<f64>,
    /// Multiplies the learning rate by the size of the tensor's values.
    pub scale_parameter: bool,
    /// The learning rate.
    pub learning_rate: LearningRate,
}

impl Default for Adafactor {
    /// What Transformers' Trainer passes.
    fn default() -> Self {
        Self {
            eps: [1e-30, 1e-3],
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            scale_parameter: false,
            learning_rate: LearningRate::Given,
        }
    }
}

impl Adafactor {
    fn learning_rate(&self, step: Step, values: &[f32]) -> f64 {
        let t = step.number as f64;
        let rate = match self.learning_rate {
            LearningRate::Given => step.lr,
            LearningRate::Relative => t.sqrt().recip().min(1e-2),
            LearningRate::RelativeWithWarmup => t.sqrt().recip().min(1e-6 * t),
        };
        if self.scale_parameter {
            rate * rms(values).max(self.eps[1])
        } else {
            rate
        }
    }

    /// The gradient over the root of its second moments.
    fn direction(
        &self,
        shape: &[usize],
        grad: Gradient<'_>,
        state: &mut [StateValues],
        step: Step,
    ) -> Vec<f32> {
        let weight = (step.number as f64).powf(self.decay_rate);
        let eps = self.eps[0];
        let mut out = vec![0.0; grad.values.len()];
        let Some([rows, cols]) = matrix(shape) else {
            let squares = grad.iter().map(|g| f64::from(g) * f64::from(g) + eps);
            let second = state[0].f32_mut();
            average(second, squares, weight);
            for ((out, g), second) in out.iter_mut().zip(grad.iter()).zip(second) {
                *out = g / second.sqrt();
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
                average(
                    of_rows,
                    row_means.into_iter().map(|mean| mean + eps),
                    weight,
                );
                average(
                    of_cols,
                    col_means.into_iter().map(|mean| mean + eps),
                    weight,
                );
                let mean = mean(of_rows) as f32;
                let row = |value: &f32| (value / mean).sqrt().recip();
                let row_factors: Vec<f32> = of_rows.iter().map(row).collect();
                let col_factors: Vec<f32> = of_cols.iter().map(|v| v.sqrt().recip()).collect();
                precondition(out, grad, [&row_factors, &col_factors], |r, c| r * c);
            },
        );
        out
    }
}

impl Optimizer for Adafactor {
    fn state(&self, shape: &[usize]) -> Vec<StateSpec> {
        let mut state = match shape {
            [batch @ .., rows, cols] => vec![
                StateSpec::f32("exp_avg_sq_row", [batch, &[*rows]].concat()),
                StateSpec::f32("exp_avg_sq_col", [batch, &[*cols]].concat()),
            ],
            _ => vec![StateSpec::f32("exp_avg_sq", shape)],
        };
        if self.beta1.is_some() {
            state.push(StateSpec::f32("exp_avg", shape));
        }
        state
    }

    fn update(&self, tensor: Tensor<'_>, state: &mut [StateValues], step: Step) -> Result<()> {
        let lr = self.learning_rate(step, tensor.values);
        let mut update = self.direction(tensor.shape, tensor.grad, state, step);
        let factor = (lr / (rms(&update) / self.clip_threshold).max(1.0)) as f32;
        update.iter_mut().for_each(|value| *value *= factor);
        if let (Some(beta1), Some(first)) = (self.beta1, state.last_mut()) {
            let [old, new] = [beta1 as f32, (1.0 - beta1) as f32];
            for (update, first) in update.iter_mut().zip(first.f32_mut()) {
                *first = *first * old + *update * new;
                *update = *first;
            }
        }
        let keep = (1.0 - step.weight_decay * lr) as f32;
        for (value, update) in tensor.values.iter_mut().zip(update) {
            *value = *value * keep - update;
        }
        Ok(())
    }

    fn scratch_bytes(&self, shape: &[usize]) -> u64 {
        4 * shape.iter().product::<usize>() as u64
    }
}

pub(super) fn build(_: &Shared, args: &mut Kwargs<'_>) -> Built {
    let standard = Adafactor::default();
    for key in ["relative_step", "warmup_init"] {
        if args.flag(key, false)? {
            return Err(args.error(
                key,
                "would replace learning_rate and its schedule, which drive every optimizer here; leave it out",
            ));
        }
    }
    Ok(OptimizerChoice::per_tensor(Adafactor {
        eps: [
            args.number("eps1", standard.eps[0])?,
            args.number("eps2", standard.eps[1])?,
        ],
        clip_threshold: args.positive("clip_threshold", standard.clip_threshold)?,
        decay_rate: args.negative("decay_rate", standard.decay_rate)?,
        beta1: args.optional_share("beta1")?,
        scale_parameter: args.flag("scale_parameter", false)?,
        ..standard
    }))
}
