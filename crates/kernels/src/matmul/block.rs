//! One sequential f32 product on blocks of matrices, and scratch memory for such blocks.

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

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Runs `body` with `len` f32 values of stale contents that belong to this thread.
///
/// Calls nest. The memory is kept for the next call, so `len` should be a block, not a tensor.
pub(crate) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if memory.len() < len {
        // Growing would copy the stale contents.
        memory = vec![0.0; len];
    }
    let result = body(&mut memory[..len]);
    SCRATCH.with_borrow_mut(|stack| stack.push(memory));
    result
}
