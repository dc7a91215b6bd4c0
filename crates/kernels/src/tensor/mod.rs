//! The small tensor of the hot path: a buffer, a dtype, two dimensions and a row pitch.
//!
//! No broadcasting, no general views, no autograd. [`Tensor`] owns, [`View`] and [`ViewMut`] borrow
//! a rectangle of it, [`Rows`] and [`RowsMut`] are the same rectangles in host memory once the dtype
//! is known. The memory is the host's or a GPU's.

mod buffer;
mod dtype;
mod indices;
mod rows;
mod view;
mod view_mut;

pub use buffer::{Buffer, DeviceBuffer, DeviceSlice, Slice, SliceMut};
pub(crate) use dtype::with_dtype;
pub use dtype::{DType, Element};
pub use indices::{IndexBlock, Indices};
pub use rows::{Rows, RowsMut};
pub use view::View;
pub use view_mut::ViewMut;

use crate::Device;
use view::extent;

/// A row-major matrix `[rows, cols]` whose rows start `pitch` elements apart.
#[derive(Clone, Debug)]
pub struct Tensor {
    buffer: Buffer,
    rows: usize,
    cols: usize,
    pitch: usize,
}

impl Tensor {
    /// Zeros, rows back to back.
    #[must_use]
    pub fn zeros(dtype: DType, rows: usize, cols: usize) -> Self {
        Self {
            buffer: Buffer::zeros(dtype, rows * cols),
            rows,
            cols,
            pitch: cols,
        }
    }

    /// A matrix in the memory of `device`, rows back to back, with unspecified contents.
    #[must_use]
    pub fn empty(device: &Device, dtype: DType, rows: usize, cols: usize) -> Self {
        Self::from_buffer(Buffer::new(device, dtype, rows * cols), rows, cols)
    }

    /// [`Tensor::empty`] for what is written, read and dropped within one pass: it may be recorded in a graph.
    #[must_use]
    pub fn temporary(device: &Device, dtype: DType, rows: usize, cols: usize) -> Self {
        Self::from_buffer(Buffer::temporary(device, dtype, rows * cols), rows, cols)
    }

    /// Where the elements are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.buffer.device()
    }

    /// A copy in the memory of `device`, rows back to back.
    #[must_use]
    pub fn to_device(&self, device: &Device) -> Self {
        let mut copy = Self::empty(device, self.dtype(), self.rows, self.cols);
        copy.view_mut().copy_from(self.view());
        copy
    }

    /// Takes over `values`, rows back to back.
    ///
    /// # Panics
    /// If `values.len() != rows * cols`.
    #[must_use]
    pub fn from_f32(values: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(
            values.len(),
            rows * cols,
            "Tensor::from_f32: length is not rows * cols"
        );
        Self {
            buffer: Buffer::F32(values),
            rows,
            cols,
            pitch: cols,
        }
    }

    /// Takes over a buffer that may be longer than needed.
    ///
    /// # Panics
    /// If the buffer is shorter than `rows * cols`.
    #[must_use]
    pub fn from_buffer(buffer: Buffer, rows: usize, cols: usize) -> Self {
        assert!(
            buffer.len() >= rows * cols,
            "Tensor::from_buffer: buffer is too short"
        );
        Self {
            buffer,
            rows,
            cols,
            pitch: cols,
        }
    }

    /// Gives the buffer back, at its full length.
    #[must_use]
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.buffer.dtype()
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes the elements take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype().bytes()
    }

    /// Bytes of its buffer, which may be longer than needed.
    #[must_use]
    pub fn buffer_bytes(&self) -> usize {
        self.buffer.len() * self.dtype().bytes()
    }

    /// The whole matrix.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        let len = extent(self.rows, self.cols, self.pitch);
        View {
            data: self.buffer.slice(len),
            rows: self.rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The whole matrix, to be written.
    #[must_use]
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let len = extent(self.rows, self.cols, self.pitch);
        ViewMut {
            data: self.buffer.slice_mut(len),
            rows: self.rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The elements in row order, widened to f32.
    #[must_use]
    pub fn to_f32_vec(&self) -> Vec<f32> {
        self.view().to_f32_vec()
    }

    /// The same values in `dtype`.
    #[must_use]
    pub fn to_dtype(&self, dtype: DType) -> Self {
        let mut copy = Self::empty(&self.device(), dtype, self.rows, self.cols);
        copy.view_mut().copy_from(self.view());
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn columns_and_rows_select_the_rectangle() {
        let t = Tensor::from_f32((0..12).map(|v| v as f32).collect(), 3, 4);
        let v = t.view().columns(1..3).row_range(1..3);
        assert_eq!(v.shape(), [2, 2]);
        assert_eq!(v.to_f32_vec(), [5.0, 6.0, 9.0, 10.0]);
    }

    #[test]
    fn empty_rectangles_are_legal() {
        let mut t = Tensor::zeros(DType::F32, 0, 4);
        t.view_mut().fill(1.0);
        assert!(t.view().columns(1..2).to_f32_vec().is_empty());
        let t = Tensor::zeros(DType::Bf16, 3, 0);
        assert!(t.to_f32_vec().is_empty());
    }

    #[test]
    fn bf16_rounds_like_half() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            let ours = <bf16 as Element>::from_f32(value);
            let theirs = bf16::from_f32(value);
            if value.is_nan() {
                assert!(ours.is_nan());
            } else {
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{value}");
            }
        }
    }
}
