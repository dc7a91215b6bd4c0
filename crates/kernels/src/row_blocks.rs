//! How the row-wise operations share their work: blocks of rows, in parallel.
//!
//! The size of a block depends on the shape alone, never on the number of threads, so that sums
//! kept per block and added in block order have the same bits for any number of threads.

use crate::{Element, Rows, RowsMut, View, ViewMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator, ParallelSliceMut};

/// Elements of a block: large enough that waking a thread for it pays (some microseconds), small
/// enough that the operands of a block stay in the second-level cache.
pub(crate) const BLOCK_ELEMENTS: usize = 32 * 1024;

/// Rows in a block of a matrix with `cols` columns; at least one.
pub(crate) fn rows_per_block(cols: usize) -> usize {
    (BLOCK_ELEMENTS / cols.max(1)).max(1)
}

/// Consecutive rows of a matrix, borrowed mutably.
pub(crate) struct RowBlock<'a, T> {
    data: &'a mut [T],
    cols: usize,
    pitch: usize,
}

impl<T> RowBlock<'_, T> {
    /// The rows of the block, in order.
    #[inline(always)]
    pub(crate) fn rows(&mut self) -> impl Iterator<Item = &mut [T]> {
        let cols = self.cols;
        self.data
            .chunks_mut(self.pitch)
            .map(move |row| &mut row[..cols])
    }
}

/// The rows of `matrix` in blocks of [`rows_per_block`], in order.
///
/// A matrix of a single block stays on the calling thread.
pub(crate) fn blocks<'a, T: Element>(
    matrix: &'a mut RowsMut<'_, T>,
) -> impl IndexedParallelIterator<Item = RowBlock<'a, T>> {
    let cols = matrix.cols();
    // An empty matrix has no data: a pitch of 1 keeps the chunk size legal.
    let pitch = matrix.pitch().max(1);
    matrix
        .data_mut()
        .par_chunks_mut(pitch * rows_per_block(cols))
        .map(move |data| RowBlock { data, cols, pitch })
}

/// The elements of a view whose dtype has been matched.
pub(crate) fn typed<T: Element>(view: View<'_>) -> Rows<'_, T> {
    view.typed().expect("the dtype of the view was matched")
}

/// The elements of a mutable view whose dtype has been matched.
pub(crate) fn typed_mut<T: Element>(view: ViewMut<'_>) -> RowsMut<'_, T> {
    view.typed().expect("the dtype of the view was matched")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Tensor};

    #[test]
    fn blocks_visit_every_row_once_and_leave_the_gaps() {
        for (rows, cols) in [(0, 5), (3, 0), (1, 1), (7, 3), (40, 9_000), (3, 70_000)] {
            let mut tensor = Tensor::zeros(DType::F32, rows, cols + 2);
            let mut matrix = typed_mut::<f32>(tensor.view_mut().columns(1..1 + cols));
            let visited: Vec<usize> = blocks(&mut matrix)
                .map(|mut block| {
                    block
                        .rows()
                        .map(|row| {
                            assert_eq!(row.len(), cols);
                            row.iter_mut().for_each(|v| *v += 1.0);
                        })
                        .count()
                })
                .collect();
            let expected = if cols == 0 { 0 } else { rows };
            assert_eq!(visited.iter().sum::<usize>(), expected, "{rows} x {cols}");
            for row in tensor.to_f32_vec().chunks(cols + 2) {
                assert!(row[0] == 0.0 && row[cols + 1] == 0.0);
                assert!(row[1..=cols].iter().all(|&v| v == 1.0));
            }
        }
    }
}
