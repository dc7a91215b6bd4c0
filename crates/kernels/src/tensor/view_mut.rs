//! Mutably borrowed rectangles of a matrix.

use super::view::extent;
use super::{DType, Element, RowsMut, SliceMut, View};
use crate::cuda::CudaDevice;
use crate::{Result, copy};
use std::ops::Range;
use std::sync::Arc;

/// A mutably borrowed rectangle.
#[derive(Debug)]
pub struct ViewMut<'a> {
    pub(super) data: SliceMut<'a>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) pitch: usize,
}

impl<'a> ViewMut<'a> {
    /// Borrows `values` as `[rows, cols]`.
    ///
    /// # Panics
    /// If `values.len() != rows * cols`.
    #[must_use]
    pub fn from_f32(values: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            values.len(),
            rows * cols,
            "ViewMut::from_f32: length is not rows * cols"
        );
        Self {
            data: SliceMut::F32(values),
            rows,
            cols,
            pitch: cols,
        }
    }

    /// Borrows `values` as one row `[1, values.len()]`.
    #[must_use]
    pub fn vector(values: &'a mut [f32]) -> Self {
        let len = values.len();
        Self::from_f32(values, 1, len)
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// `[rows, cols]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
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

    /// Elements between the starts of two rows.
    #[must_use]
    pub fn pitch(&self) -> usize {
        self.pitch
    }

    /// Address of the first element in the memory of its GPU, for libraries that take one; `None` on
    /// the host.
    #[must_use]
    pub fn device_address(&mut self) -> Option<u64> {
        self.data.cuda().map(|slice| slice.ptr())
    }

    /// A shorter borrow of the same rectangle.
    #[must_use]
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut {
            data: self.data.reborrow(),
            rows: self.rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The same rectangle, to be read.
    #[must_use]
    pub fn as_view(&self) -> View<'_> {
        View {
            data: self.data.as_slice(),
            rows: self.rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The rectangle of columns `range`.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    #[must_use]
    pub fn columns(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.cols,
            "columns {range:?} of {}",
            self.cols
        );
        let cols = range.len();
        let len = extent(self.rows, cols, self.pitch);
        let start = if len == 0 { 0 } else { range.start };
        let data = self.data.range(start..start + len);
        Self {
            data,
            rows: self.rows,
            cols,
            pitch: self.pitch,
        }
    }

    /// The rectangle of rows `range`.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    #[must_use]
    pub fn row_range(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows {range:?} of {}",
            self.rows
        );
        let rows = range.len();
        let len = extent(rows, self.cols, self.pitch);
        let start = if len == 0 {
            0
        } else {
            range.start * self.pitch
        };
        let data = self.data.range(start..start + len);
        Self {
            data,
            rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The elements of rows that are back to back as `[rows, cols]`, so too.
    ///
    /// # Panics
    /// If they are not back to back, or not `rows * cols`.
    #[must_use]
    pub fn reshaped(self, rows: usize, cols: usize) -> Self {
        assert!(
            self.rows == 1 || self.pitch == self.cols,
            "ViewMut::reshaped of rows apart"
        );
        assert_eq!(self.rows * self.cols, rows * cols, "ViewMut::reshaped");
        Self {
            data: self.data.range(0..extent(rows, cols, cols)),
            rows,
            cols,
            pitch: cols,
        }
    }

    /// The columns of one row before and from `at`.
    ///
    /// # Panics
    /// If this is not one row, or `at` lies outside of it.
    #[must_use]
    pub fn split_columns(self, at: usize) -> [Self; 2] {
        assert_eq!(self.rows, 1, "ViewMut::split_columns");
        let cols = [at, self.cols - at];
        let data: [SliceMut<'a>; 2] = self.data.split_at(at).into();
        let mut cols = cols.into_iter();
        data.map(|data| {
            let cols = cols.next().unwrap_or(0);
            Self {
                data,
                rows: 1,
                cols,
                pitch: cols,
            }
        })
    }

    /// The columns before and from `at` of a matrix that a GPU holds. `None` in host memory, where two borrows
    /// cannot share rows.
    ///
    /// # Panics
    /// If `at` lies outside of it.
    pub(crate) fn columns_on_gpu(self, at: usize) -> Option<[Self; 2]> {
        let data = self.data.cuda()?;
        let of = |columns: Range<usize>| {
            Self {
                data: SliceMut::Cuda(data),
                ..self
            }
            .columns(columns)
        };
        Some([of(0..at), of(at..self.cols)])
    }

    /// The GPU that holds the elements, or `None` if the host does.
    #[must_use]
    pub fn device(&self) -> Option<&'a Arc<CudaDevice>> {
        self.data.cuda().map(|data| data.device())
    }

    /// Address of the first element in the memory of the GPU; 0 if the host holds it.
    pub(crate) fn ptr(&self) -> u64 {
        self.data.cuda().map_or(0, |data| data.ptr())
    }

    /// Itself, if it is f32 and its rows are back to back, wherever they are.
    pub(crate) fn dense_f32(self, op: &'static str, what: &'static str) -> Result<Self> {
        self.as_view().dense_f32(op, what)?;
        Ok(self)
    }

    /// The elements, if the host holds them, they are f32 and the rows back to back.
    pub(crate) fn contiguous(self, op: &'static str, what: &'static str) -> Result<&'a mut [f32]> {
        self.as_view().dense_f32(op, what)?;
        Ok(match self.data {
            SliceMut::F32(data) => data,
            SliceMut::Bf16(_) | SliceMut::Cuda(_) => &mut [],
        })
    }

    /// The elements, if the host holds them and they are of type `T`.
    #[must_use]
    pub fn typed<T: Element>(self) -> Option<RowsMut<'a, T>> {
        T::slice_mut(self.data).map(|data| RowsMut {
            data,
            rows: self.rows,
            cols: self.cols,
            pitch: self.pitch,
        })
    }

    /// Sets every element to `value`.
    pub fn fill(self, value: f32) {
        copy::fill(self, value);
    }

    /// Copies `source`, converting the dtype, from whichever device to whichever.
    ///
    /// A GPU that fails says so with its next operation.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn copy_from(self, source: View<'_>) {
        assert_eq!(
            self.shape(),
            source.shape(),
            "ViewMut::copy_from: shapes differ"
        );
        copy::copy(self, source);
    }
}
