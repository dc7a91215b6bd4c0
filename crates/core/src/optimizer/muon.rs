use super::registry::{Built, Shared};
use super::{
    Adam, Elementwise, Optimizer, OptimizerChoice, StateSpec, StateValues, Step, Tensor, adam,
};
use crate::Result;
use crate::kwargs::Kwargs;
use crate::params::transpose;
use ferrotune_kernels::adamw::global_norm;
use ferrotune_kernels::{DType, Device, Tensor as Matrix, matmul};
use half::bf16;

/// How [`Muon`]'s learning rate follows the shape of a matrix of `out` rows and `in` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdjustLr {
    /// `sqrt(max(1, out / in))`.
    Original,
    /// `0.2 sqrt(max(out, in))`: updates of the size of `AdamW`'s.
    MatchRmsAdamW,
    /// `sqrt(out / in)`.
    SpectralUnclamped,
}

impl AdjustLr {
    /// PyTorch's word for it.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("original", Self::Original),
        ("match_rms_adamw", Self::MatchRmsAdamW),
        ("spectral_unclamped", Self::SpectralUnclamped),
    ];

    fn factor(self, [rows, cols]: [usize; 2]) -> f64 {
        let (rows, cols) = (rows as f64, cols as f64);
        match self {
            Self::Original => (rows / cols).max(1.0).sqrt(),
            Self::MatchRmsAdamW => 0.2 * rows.max(cols).sqrt(),
            Self::SpectralUnclamped => (rows / cols).sqrt(),
        }
    }
}

/// Muon: the momentum of a matrix, made orthogonal.
///
/// ```text
/// b <- b + (1 - momentum) (g - b)
/// u  = g + momentum (b - g) with nesterov, else b
/// p <- p (1 - lr weight_decay) - lr * adjust * orthogonal(u)
/// ```
///
/// `orthogonal` is `ns_steps` times `X <- a X + (b A + c A A) X` with `A = X X^T`, from `u` over its norm, in bf16.
///
/// # Source
/// Jordan: "Muon: An optimizer for hidden layers in neural networks" (2024); `torch.optim.Muon` (2.15), which takes
/// matrices alone.
#[derive(Clone, Debug)]
pub struct Muon {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
    /// Coefficients of an iteration.
    pub ns_coefficients: [f64; 3],
    /// Iterations.
    pub ns_steps: u64,
    /// Least norm to divide by.
    pub eps: f64,
    /// Learning rate by shape.
    pub adjust_lr: AdjustLr,
    /// What updates tensors that are no matrices; `None` leaves them as they are.
    pub others: Option<Elementwise<Adam>>,
}

impl Default for Muon {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            nesterov: true,
            ns_coefficients: [3.4445, -4.775, 2.0315],
            ns_steps: 5,
            eps: 1e-7,
            adjust_lr: AdjustLr::Original,
            others: None,
        }
    }
}

impl Muon {
    /// The orthogonal matrix nearest to `update` `[rows, cols]`, roughly.
    fn orthogonal(&self, update: &[f32], [rows, cols]: [usize; 2]) -> Result<Vec<f32>> {
        // Of the two products with its transpose, the smaller.
        if rows > cols {
            let turned = self.of_wide(transpose(update, rows, cols), [cols, rows])?;
            return Ok(transpose(&turned, cols, rows));
        }
        self.of_wide(update.to_vec(), [rows, cols])
    }

    fn of_wide(&self, update: Vec<f32>, [rows, cols]: [usize; 2]) -> Result<Vec<f32>> {
        let bf16 = |rows: usize, cols: usize| Matrix::empty(&Device::Cpu, DType::Bf16, rows, cols);
        let [a, b, c] = self.ns_coefficients.map(|value| value as f32);
        let mut x = self.normalised(update, [rows, cols]);
        for _ in 0..self.ns_steps {
            let mut gram = bf16(rows, rows);
            matmul::nt(gram.view_mut(), 0.0, 1.0, x.view(), x.view())?;
            let mut polynomial = bf16(rows, rows);
            polynomial.view_mut().copy_from(gram.view());
            matmul::nn(polynomial.view_mut(), b, c, gram.view(), gram.view())?;
            let mut next = bf16(rows, cols);
            next.view_mut().copy_from(x.view());
            matmul::nn(next.view_mut(), a, 1.0, polynomial.view(), x.view())?;
            x = next;
        }
        Ok(x.to_f32_vec())
    }

    /// `update` in bf16, over its norm in bf16.
    fn normalised(&self, update: Vec<f32>, [rows, cols]: [usize; 2]) -> Matrix {
        let rounded = Matrix::from_f32(update, rows, cols).to_dtype(DType::Bf16);
        let mut values = rounded.to_f32_vec();
        let norm = bf16::from_f64(global_norm(&values)).to_f64().max(self.eps) as f32;
        values.iter_mut().for_each(|value| *value /= norm);
        Matrix::from_f32(values, rows, cols).to_dtype(DType::Bf16)
    }
}

impl Optimizer for Muon {
    fn state(&self, shape: &[usize]) -> Vec<StateSpec> {
        match (shape, &self.others) {
            ([_, _], _) => vec![StateSpec::f32("momentum_buffer", shape)],
            (_, Some(others)) => others.state(shape),
            (_, None) => Vec::new(),
        }
    }

    fn update(&self, tensor: Tensor<'_>, state: &mut [StateValues], step: Step) -> Result<()> {
        let (&[rows, cols], [buffer, ..]) = (tensor.shape, &mut *state) else {
            return match &self.others {
                Some(others) => others.update(tensor, state, step),
                None => Ok(()),
            };
        };
        let [momentum, fresh] = [self.momentum as f32, (1.0 - self.momentum) as f32];
        let both = buffer.f32_mut().iter_mut().zip(tensor.grad.iter());
        let update: Vec<f32> = both
            .map(|(buffer, g)| {
                *buffer += fresh * (g - *buffer);
                if self.nesterov {
                    g + momentum * (*buffer - g)
                } else {
                    *buffer
                }
            })
            .collect();
        let update = self.orthogonal(&update, [rows, cols])?;
        let shape = if tensor.transposed {
            [cols, rows]
        } else {
            [rows, cols]
        };
        let lr = (step.lr * self.adjust_lr.factor(shape)) as f32;
        let keep = (1.0 - step.lr * step.weight_decay) as f32;
        for (value, update) in tensor.values.iter_mut().zip(update) {
            *value = *value * keep - lr * update;
        }
        Ok(())
    }

    fn scratch_bytes(&self, shape: &[usize]) -> u64 {
        // The update, turned, and what an iteration reads and writes.
        match shape {
            [_, _] => 16 * shape.iter().product::<usize>() as u64,
            _ => 0,
        }
    }
}

/// With `AdamW` for what is no matrix, as PyTorch advises.
pub(super) fn build(shared: &Shared, args: &mut Kwargs<'_>) -> Built {
    let standard = Muon::default();
    let names = AdjustLr::NAMES.map(|(name, _)| name);
    let asked = args.choice("adjust_lr_fn", &names)?;
    let adjust_lr = AdjustLr::NAMES
        .into_iter()
        .find(|(name, _)| Some(*name) == asked);
    let ns_steps = args.count("ns_steps")?.unwrap_or(standard.ns_steps);
    if ns_steps >= 100 {
        return Err(args.error("ns_steps", "expected fewer than 100"));
    }
    Ok(OptimizerChoice::per_tensor(Muon {
        momentum: args.share("momentum", standard.momentum)?,
        nesterov: args.flag("nesterov", standard.nesterov)?,
        ns_steps,
        adjust_lr: adjust_lr.map_or(standard.adjust_lr, |(_, adjust)| adjust),
        others: Some(Elementwise(adam::of_bitsandbytes(shared))),
        ..standard
    }))
}
