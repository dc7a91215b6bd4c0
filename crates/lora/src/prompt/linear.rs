//! A linear of an encoder, `y = x W^T + b`, on the host.

use ferrotune_core::Result;
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Tensor, View, ViewMut, matmul};

/// W `[out, in]` and b `[out]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Linear {
    pub(super) weight: ParamId,
    pub(super) bias: ParamId,
    pub(super) shape: [usize; 2],
}

impl Linear {
    /// Declares `name.weight` and `name.bias`.
    pub(super) fn new(
        name: &str,
        shape: [usize; 2],
        add: &mut dyn FnMut(String, Vec<usize>) -> ParamId,
    ) -> Self {
        Self {
            weight: add(format!("{name}.weight"), shape.to_vec()),
            bias: add(format!("{name}.bias"), vec![shape[0]]),
            shape,
        }
    }

    /// `[rows, out]` of x `[rows, in]`.
    pub(super) fn forward(&self, params: &FlatBuffer, x: &[f32]) -> Result<Vec<f32>> {
        let y = product(x, params.get(self.weight), self.shape)?;
        Ok(plus(y, params.get(self.bias)))
    }

    /// The gradient of x; adds those of weight and bias.
    pub(super) fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        x: &[f32],
        d_y: &[f32],
    ) -> Result<Vec<f32>> {
        add_weight_gradient(grads.get_mut(self.weight), self.shape, x, d_y)?;
        add_columns(grads.get_mut(self.bias), d_y);
        product_backward(d_y, params.get(self.weight), self.shape)
    }
}

/// `x W^T`.
pub(super) fn product(x: &[f32], weight: &[f32], [out, inputs]: [usize; 2]) -> Result<Vec<f32>> {
    let rows = x.len() / inputs;
    let mut y = Tensor::zeros(DType::F32, rows, out);
    let (x, weight) = (
        View::from_f32(x, rows, inputs),
        View::from_f32(weight, out, inputs),
    );
    matmul::nt(y.view_mut(), 0.0, 1.0, x, weight)?;
    Ok(y.to_f32_vec())
}

/// `d_y W`.
pub(super) fn product_backward(
    d_y: &[f32],
    weight: &[f32],
    [out, inputs]: [usize; 2],
) -> Result<Vec<f32>> {
    let rows = d_y.len() / out;
    let mut d_x = Tensor::zeros(DType::F32, rows, inputs);
    let (d_y, weight) = (
        View::from_f32(d_y, rows, out),
        View::from_f32(weight, out, inputs),
    );
    matmul::nn(d_x.view_mut(), 0.0, 1.0, d_y, weight)?;
    Ok(d_x.to_f32_vec())
}

/// `d_W += d_y^T x`.
pub(super) fn add_weight_gradient(
    to: &mut [f32],
    [out, inputs]: [usize; 2],
    x: &[f32],
    d_y: &[f32],
) -> Result<()> {
    let rows = x.len() / inputs;
    let (x, d_y) = (
        View::from_f32(x, rows, inputs),
        View::from_f32(d_y, rows, out),
    );
    Ok(matmul::tn(
        ViewMut::from_f32(to, out, inputs),
        1.0,
        1.0,
        d_y,
        x,
    )?)
}

/// Adds the sum over rows.
pub(super) fn add_columns(to: &mut [f32], rows: &[f32]) {
    for row in rows.chunks_exact(to.len()) {
        to.iter_mut().zip(row).for_each(|(to, value)| *to += value);
    }
}

/// Every row plus `vector`.
pub(super) fn plus(mut rows: Vec<f32>, vector: &[f32]) -> Vec<f32> {
    for row in rows.chunks_exact_mut(vector.len()) {
        row.iter_mut()
            .zip(vector)
            .for_each(|(value, v)| *value += v);
    }
    rows
}
