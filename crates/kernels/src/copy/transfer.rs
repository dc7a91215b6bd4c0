//! Copies between host memory and that of a GPU.

use crate::cuda::{CudaDevice, Pitch};
use crate::tensor::with_dtype;
use crate::{Result, Tensor, View, ViewMut};

/// The bytes that a copy between matrices of one shape and dtype moves.
pub(super) fn rectangle(to: View<'_>, from: View<'_>) -> Pitch {
    let bytes = from.dtype().bytes();
    let ([rows, cols], src, dst) = (from.shape(), from.pitch(), to.pitch());
    // Rows back to back on both sides are one.
    let [rows, cols] = if src == cols && dst == cols {
        [1, rows * cols]
    } else {
        [rows, cols]
    };
    Pitch {
        rows,
        row_bytes: cols * bytes,
        src: src * bytes,
        dst: dst * bytes,
    }
}

/// Copies a matrix in host memory to one on `device`.
pub(super) fn upload(device: &CudaDevice, to: ViewMut<'_>, from: View<'_>) -> Result<()> {
    if from.dtype() != to.dtype() {
        let mut converted = Tensor::zeros(to.dtype(), from.rows(), from.cols());
        converted.view_mut().copy_from(from);
        return upload(device, to, converted.view());
    }
    let pitch = rectangle(to.as_view(), from);
    with_dtype!(from.dtype(), T => from.typed::<T>().map_or(Ok(()), |from| {
        device.upload_2d(to.ptr(), bytemuck::cast_slice(from.data()), pitch)
    }))
}

/// Copies a matrix on `device` to one in host memory.
pub(super) fn download(device: &CudaDevice, to: ViewMut<'_>, from: View<'_>) -> Result<()> {
    if from.dtype() != to.dtype() {
        to.copy_from(to_host(from).view());
        return Ok(());
    }
    let pitch = rectangle(to.as_view(), from);
    with_dtype!(from.dtype(), T => to.typed::<T>().map_or(Ok(()), |mut to| {
        device.download_2d(bytemuck::cast_slice_mut(to.data_mut()), from.ptr(), pitch)
    }))
}

/// A copy in host memory, rows back to back; NaN where the device has failed.
pub(crate) fn to_host(from: View<'_>) -> Tensor {
    let mut host = Tensor::zeros(from.dtype(), from.rows(), from.cols());
    host.view_mut().copy_from(from);
    host
}
