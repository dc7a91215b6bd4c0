//! One sequential f32 product on blocks of matrices, and scratch memory for such blocks.

use super::transpose::transpose;
use crate::tensor::with_dtype;
use crate::{DType, Element, Rows, View, simd};
use std::cell::RefCell;
use std::ops::Range;

/// A block of f32 values `[rows, cols]` with any two strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `cols` elements that start `pitch` apart in `data`.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, pitch: usize) -> Self {
        let used = if rows == 0 || cols == 0 {
            0
        } else {
            (rows - 1) * pitch + cols
        };
        Self {
            data: &data[..used],
            rows,
            cols,
            row_stride: pitch,
            col_stride: 1,
        }
    }

    /// Row `r` of a matrix whose rows are contiguous.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> &'a [f32] {
        assert_eq!(self.col_stride, 1, "row of a transposed matrix");
        &self.data[r * self.row_stride..r * self.row_stride + self.cols]
    }

    /// The columns `range` of a matrix whose rows are contiguous.
    pub(crate) fn columns(self, range: Range<usize>) -> Self {
        assert_eq!(self.col_stride, 1, "columns of a transposed matrix");
        assert!(range.end <= self.cols, "columns {range:?} of {}", self.cols);
        if self.rows == 0 || range.is_empty() {
            return Self::new(&[], self.rows, range.len(), self.row_stride);
        }
        let data = &self.data[range.start..];
        Self::new(data, self.rows, range.len(), self.row_stride)
    }

    /// The rows `range` of a matrix whose rows are contiguous.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        assert_eq!(self.col_stride, 1, "rows of a transposed matrix");
        assert!(range.end <= self.rows, "rows {range:?} of {}", self.rows);
        if range.is_empty() || self.cols == 0 {
            return Self::new(&[], range.len(), self.cols, self.row_stride);
        }
        let data = &self.data[range.start * self.row_stride..];
        Self::new(data, range.len(), self.cols, self.row_stride)
    }

    /// The transpose, without moving anything.
    pub(crate) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// `dst = beta * dst + alpha * a b` on one thread, `dst` being rows that start `pitch` apart.
///
/// With `beta = 0` the contents of `dst` are not read.
pub(crate) fn gemm(
    dst: &mut [f32],
    pitch: usize,
    beta: f32,
    alpha: f32,
    a: Matrix<'_>,
    b: Matrix<'_>,
) {
    let (m, n) = (a.rows, b.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= pitch || m == 1, "gemm: the rows of the result overlap");
    assert!(
        (m - 1) * pitch + n <= dst.len(),
        "gemm: the result is too short"
    );
    // SAFETY: the rectangle [m, n] lies inside `dst` (asserted above), which is borrowed mutably.
    unsafe { gemm_raw(dst.as_mut_ptr(), pitch, beta, alpha, a, b) }
}

/// [`gemm`] into a rectangle of which other threads may hold disjoint columns.
///
/// # Safety
/// For every row `r < a.rows`, the `b.cols` elements from `dst + r * pitch` must be writable and
/// accessed by nobody else during the call. With `beta != 0` they must be initialised.
pub(crate) unsafe fn gemm_raw(
    dst: *mut f32,
    pitch: usize,
    beta: f32,
    alpha: f32,
    a: Matrix<'_>,
    b: Matrix<'_>,
) {
    assert_eq!(a.cols, b.rows, "gemm: inner dimensions differ");
    let (m, n, k) = (a.rows, b.cols, a.cols);
    // SAFETY: the reads stay inside `a.data` and `b.data`, whose extents `Matrix::new` checked;
    // the writes inside the rectangle the caller vouches for. Strides fit isize because the slices
    // they index exist.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            pitch as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A pointer that tasks writing disjoint parts of one buffer share.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: the pointer is only a number; each use of it states why its target is not shared.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Points to the first element of `slice`.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// The range must lie inside the slice given to [`SharedMut::new`], which must still be
    /// mutably borrowed by the caller, and nobody else may access these elements meanwhile.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }

    /// The address of element `at`.
    ///
    /// # Safety
    /// `at` must lie inside the slice given to [`SharedMut::new`], or one past its end.
    pub(crate) unsafe fn at(&self, at: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(at) }
    }
}

/// Elements of a cache line. Scratch starts on one: vectors as wide as a line then touch only one.
const LINE: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Runs `body` with `len` f32 values of stale contents that belong to this thread.
///
/// Calls nest. The memory is kept for the next call, so `len` should be a block, not a tensor.
pub(crate) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if memory.len() < len + LINE {
        // Growing would copy the stale contents.
        memory = vec![0.0; len + LINE];
    }
    let start = memory.as_ptr().align_offset(LINE * size_of::<f32>());
    let result = body(&mut memory[start..start + len]);
    SCRATCH.with_borrow_mut(|stack| stack.push(memory));
    result
}

/// Cuts `len` elements off the front of `scratch`.
pub(crate) fn carve<'s>(scratch: &mut &'s mut [f32], len: usize) -> &'s mut [f32] {
    let (front, rest) = std::mem::take(scratch).split_at_mut(len);
    *scratch = rest;
    front
}

/// A block of a matrix in f32: as it lies if it is f32, converted into `scratch` if not.
///
/// `scratch` needs one element per element of the block, or none if the source is f32.
pub(crate) fn operand<'s, T: Element>(
    source: &Rows<'s, T>,
    rows: Range<usize>,
    cols: Range<usize>,
    scratch: &'s mut [f32],
) -> Matrix<'s> {
    let (height, width) = (rows.len(), cols.len());
    if rows.is_empty() || cols.is_empty() {
        return Matrix::new(&[], height, width, width);
    }
    if T::DTYPE == DType::F32 {
        let data: &'s [f32] = bytemuck::cast_slice(source.data());
        let data = &data[rows.start * source.pitch() + cols.start..];
        return Matrix::new(data, height, width, source.pitch());
    }
    simd::dispatch(
        #[inline(always)]
        || {
            for (to, r) in scratch.chunks_exact_mut(width).zip(rows) {
                for (to, from) in to.iter_mut().zip(&source.row(r)[cols.clone()]) {
                    *to = from.to_f32();
                }
            }
        },
    );
    Matrix::new(scratch, height, width, width)
}

/// The transpose of a block of a matrix in f32, in `scratch` (one element per element).
pub(crate) fn flipped<'s, T: Element>(
    source: &Rows<'_, T>,
    rows: Range<usize>,
    cols: Range<usize>,
    scratch: &'s mut [f32],
) -> Matrix<'s> {
    let (height, width) = (rows.len(), cols.len());
    simd::dispatch(
        #[inline(always)]
        || {
            let row = |r: usize| &source.row(rows.start + r)[cols.clone()];
            transpose(row, height, width, scratch, height);
        },
    );
    Matrix::new(scratch, width, height, height)
}

/// [`operand`] of a view of any dtype.
pub(crate) fn view_operand<'s>(
    source: View<'s>,
    rows: Range<usize>,
    cols: Range<usize>,
    scratch: &'s mut [f32],
) -> Matrix<'s> {
    with_dtype!(source.dtype(), T => match source.typed::<T>() {
        Some(source) => operand(&source, rows, cols, scratch),
        None => unreachable!("with_dtype! binds the view's own dtype"),
    })
}

/// [`flipped`] of a view of any dtype.
pub(crate) fn view_flipped<'s>(
    source: View<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
    scratch: &'s mut [f32],
) -> Matrix<'s> {
    with_dtype!(source.dtype(), T => match source.typed::<T>() {
        Some(source) => flipped(&source, rows, cols, scratch),
        None => unreachable!("with_dtype! binds the view's own dtype"),
    })
}
