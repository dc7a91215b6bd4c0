//! Borrowed rectangles of a matrix.

use super::{DType, Element, Rows, Slice, with_dtype};
use crate::Result;
use crate::cuda::CudaDevice;
use crate::error::check_dtype;
use std::ops::Range;
use std::sync::Arc;

/// Elements from the first of the first row to the last of the last row.
pub(super) const fn extent(rows: usize, cols: usize, pitch: usize) -> usize {
    if rows == 0 || cols == 0 {
        0
    } else {
        (rows - 1) * pitch + cols
    }
}

/// A borrowed rectangle.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(super) data: Slice<'a>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) pitch: usize,
}

impl<'a> View<'a> {
    /// Borrows `values` as `[rows, cols]`.
    ///
    /// # Panics
    /// If `values.len() != rows * cols`.
    #[must_use]
    pub fn from_f32(values: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            values.len(),
            rows * cols,
            "View::from_f32: length is not rows * cols"
        );
        Self {
            data: Slice::F32(values),
            rows,
            cols,
            pitch: cols,
        }
    }

    /// Borrows `values` as one row `[1, values.len()]`.
    #[must_use]
    pub fn vector(values: &'a [f32]) -> Self {
        Self::from_f32(values, 1, values.len())
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
            "View::reshaped of rows apart"
        );
        assert_eq!(self.rows * self.cols, rows * cols, "View::reshaped");
        Self {
            data: self.data.range(0..extent(rows, cols, cols)),
            rows,
            cols,
            pitch: cols,
        }
    }

    /// The GPU that holds the elements, or `None` if the host does.
    #[must_use]
    pub fn device(&self) -> Option<&'a Arc<CudaDevice>> {
        self.data.cuda().map(|data| data.device())
    }

    /// Address of the first element in the memory of the GPU; 0 if the host holds it.
    #[must_use]
    pub fn ptr(&self) -> u64 {
        self.data.cuda().map_or(0, |data| data.ptr())
    }

    /// The elements, if the host holds them, they are of type `T` and the rows back to back.
    pub(crate) fn contiguous(self, op: &'static str, what: &'static str) -> Result<&'a [f32]> {
        let rows = self.dense_f32(op, what)?;
        Ok(rows.typed::<f32>().map_or(&[], |rows| rows.data()))
    }

    /// Itself, if it is f32 and its rows are back to back, wherever they are.
    pub(crate) fn dense_f32(self, op: &'static str, what: &'static str) -> Result<Self> {
        check_dtype(op, what, DType::F32, self.dtype())?;
        self.packed(op, what)
    }

    /// Itself, if its rows are back to back.
    pub(crate) fn packed(self, op: &'static str, what: &'static str) -> Result<Self> {
        if self.rows > 1 && self.pitch != self.cols {
            let (pitch, cols) = (self.pitch, self.cols);
            let message = format!("{what} has a row pitch of {pitch}, expected its width {cols}");
            return Err(crate::Error::Invalid { op, message });
        }
        Ok(self)
    }

    /// The elements, if the host holds them and they are of type `T`.
    #[must_use]
    pub fn typed<T: Element>(self) -> Option<Rows<'a, T>> {
        T::slice(self.data).map(|data| Rows {
            data,
            rows: self.rows,
            cols: self.cols,
            pitch: self.pitch,
        })
    }

    /// The elements in row order, widened to f32.
    ///
    /// From a GPU they are copied; after a failure of the device, which its next operation reports,
    /// they are NaN.
    #[must_use]
    pub fn to_f32_vec(self) -> Vec<f32> {
        if self.device().is_some() {
            return crate::copy::to_host(self).to_f32_vec();
        }
        let mut out = Vec::with_capacity(self.rows * self.cols);
        with_dtype!(self.dtype(), T => {
            if let Some(rows) = self.typed::<T>() {
                for r in 0..rows.rows() {
                    out.extend(rows.row(r).iter().map(|v| v.to_f32()));
                }
            }
        });
        out
    }
}
