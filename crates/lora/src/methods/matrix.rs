//! Small dense algebra on host matrices, row by row, f32.

use ferrotune_core::Result;
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Tensor, View, ViewMut, matmul};

/// A parameter as a matrix in host memory, whatever its shape.
pub(super) fn param(params: &FlatBuffer, id: ParamId, rows: usize, cols: usize) -> View<'_> {
    View::from_f32(params.get(id), rows, cols)
}

/// `a b`.
pub(super) fn nn(a: View<'_>, b: View<'_>) -> Result<Tensor> {
    let mut out = Tensor::zeros(DType::F32, a.rows(), b.cols());
    matmul::nn(out.view_mut(), 0.0, 1.0, a, b)?;
    Ok(out)
}

/// `a^T b`.
pub(super) fn tn(a: View<'_>, b: View<'_>) -> Result<Tensor> {
    let mut out = Tensor::zeros(DType::F32, a.cols(), b.cols());
    matmul::tn(out.view_mut(), 0.0, 1.0, a, b)?;
    Ok(out)
}

/// The gradient of a parameter as a matrix in host memory, to be added to.
pub(super) fn grad(grads: &mut FlatBuffer, id: ParamId, rows: usize, cols: usize) -> ViewMut<'_> {
    ViewMut::from_f32(grads.get_mut(id), rows, cols)
}

/// The elements of a host matrix whose rows are back to back.
pub(super) fn elements(view: View<'_>) -> Vec<f32> {
    view.to_f32_vec()
}

/// Changes a host matrix element by element: `change(row, column, value)`.
pub(super) fn update(out: ViewMut<'_>, change: impl Fn(usize, usize, f32) -> f32) {
    let [rows, cols] = out.shape();
    let mut values = out.as_view().to_f32_vec();
    for (i, value) in values.iter_mut().enumerate() {
        *value = change(i / cols, i % cols, *value);
    }
    out.copy_from(View::from_f32(&values, rows, cols));
}

/// Adds `values` to `to`.
pub(super) fn add(to: &mut [f32], values: &[f32]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += value;
    }
}
