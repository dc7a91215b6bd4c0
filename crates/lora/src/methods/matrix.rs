//! Small dense algebra on matrices, f32, where they are: in host memory or a GPU's.

use ferrotune_core::Result;
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Device, Tensor, View, ViewMut, matmul};
use std::sync::Arc;

/// Where `view` is.
pub(super) fn device_of(view: View<'_>) -> Device {
    match view.device() {
        Some(device) => Device::Cuda(Arc::clone(device)),
        None => Device::Cpu,
    }
}

/// A parameter as a matrix, whatever its shape, on the side of `beside`.
pub(super) fn param<'a>(
    params: &'a FlatBuffer,
    id: ParamId,
    shape: [usize; 2],
    beside: View<'_>,
) -> View<'a> {
    match beside.device() {
        Some(_) => params.view_as_matrix(id, shape),
        None => View::from_f32(params.get(id), shape[0], shape[1]),
    }
}

/// The gradient of a parameter as a matrix, to be added to, on the side of `beside`.
pub(super) fn grad<'a>(
    grads: &'a mut FlatBuffer,
    id: ParamId,
    shape: [usize; 2],
    beside: View<'_>,
) -> ViewMut<'a> {
    match beside.device() {
        Some(_) => grads.view_as_matrix_mut(id, shape),
        None => ViewMut::from_f32(grads.get_mut(id), shape[0], shape[1]),
    }
}

/// A matrix of unspecified contents on the side of `beside`, for one pass.
pub(super) fn empty(beside: View<'_>, rows: usize, cols: usize) -> Tensor {
    Tensor::temporary(&device_of(beside), DType::F32, rows, cols)
}

/// A copy of `view`.
pub(super) fn copy_of(view: View<'_>) -> Tensor {
    let mut copy = empty(view, view.rows(), view.cols());
    copy.view_mut().copy_from(view);
    copy
}

/// `a b`.
pub(super) fn nn(a: View<'_>, b: View<'_>) -> Result<Tensor> {
    let mut out = empty(a, a.rows(), b.cols());
    matmul::nn(out.view_mut(), 0.0, 1.0, a, b)?;
    Ok(out)
}

/// `a^T b`.
pub(super) fn tn(a: View<'_>, b: View<'_>) -> Result<Tensor> {
    let mut out = empty(a, a.cols(), b.cols());
    matmul::tn(out.view_mut(), 0.0, 1.0, a, b)?;
    Ok(out)
}

/// The elements of a matrix, row by row, in host memory.
pub(super) fn elements(view: View<'_>) -> Vec<f32> {
    view.to_f32_vec()
}

/// Changes a matrix element by element, in host memory: `change(row, column, value)`.
pub(super) fn update(out: ViewMut<'_>, change: impl Fn(usize, usize, f32) -> f32) {
    let [rows, cols] = out.shape();
    let mut values = elements(out.as_view());
    for (i, value) in values.iter_mut().enumerate() {
        *value = change(i / cols, i % cols, *value);
    }
    out.copy_from(View::from_f32(&values, rows, cols));
}
