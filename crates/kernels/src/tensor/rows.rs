//! Rectangles in host memory whose element type is known.

use super::Element;
use rayon::prelude::*;

/// A borrowed rectangle of known element type.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    pub(super) data: &'a [T],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) pitch: usize,
}

impl<'a, T: Element> Rows<'a, T> {
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
    /// Row `r`.
    #[inline(always)]
    #[must_use]
    pub fn row(&self, r: usize) -> &'a [T] {
        if self.cols == 0 {
            return &[];
        }
        &self.data[r * self.pitch..r * self.pitch + self.cols]
    }
    /// From the first element of the first row to the last of the last row, gaps included.
    #[must_use]
    pub fn data(&self) -> &'a [T] {
        self.data
    }
}

/// A mutably borrowed rectangle of known element type.
#[derive(Debug)]
pub struct RowsMut<'a, T> {
    pub(super) data: &'a mut [T],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) pitch: usize,
}

impl<T: Element> RowsMut<'_, T> {
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
    /// Row `r`.
    #[inline(always)]
    pub fn row_mut(&mut self, r: usize) -> &mut [T] {
        if self.cols == 0 {
            return &mut [];
        }
        &mut self.data[r * self.pitch..r * self.pitch + self.cols]
    }
    /// From the first element of the first row to the last of the last row, gaps included.
    pub fn data_mut(&mut self) -> &mut [T] {
        self.data
    }
    /// The rows, as a parallel iterator in order.
    pub fn par_rows_mut(&mut self) -> impl IndexedParallelIterator<Item = &mut [T]> {
        let cols = self.cols;
        // An empty rectangle has no data: a pitch of 1 keeps the chunk size legal.
        self.data
            .par_chunks_mut(self.pitch.max(1))
            .map(move |chunk| &mut chunk[..cols])
    }
}
