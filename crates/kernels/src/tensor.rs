//! The small tensor of the hot path: a buffer, a dtype, two dimensions and a row pitch.
//!
//! No broadcasting, no general views, no autograd. [`Tensor`] owns, [`View`] and [`ViewMut`] borrow
//! a rectangle of it, [`Rows`] and [`RowsMut`] are the same rectangles once the dtype is known.

use half::bf16;
use rayon::prelude::*;
use std::fmt;
use std::ops::Range;

/// Element type of a tensor. Statistics and accumulators are always f32 or wider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
}

impl DType {
    /// Size of one element in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// A type that a tensor can hold.
pub trait Element: Copy + Default + Send + Sync + bytemuck::Pod + 'static {
    /// Its dtype.
    const DTYPE: DType;
    /// Widens to f32, exactly.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;
    /// The slice, if it holds this type.
    fn slice(slice: Slice<'_>) -> Option<&[Self]>;
    /// The mutable slice, if it holds this type.
    fn slice_mut(slice: SliceMut<'_>) -> Option<&mut [Self]>;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    fn slice(slice: Slice<'_>) -> Option<&[Self]> {
        if let Slice::F32(s) = slice {
            Some(s)
        } else {
            None
        }
    }
    fn slice_mut(slice: SliceMut<'_>) -> Option<&mut [Self]> {
        if let SliceMut::F32(s) = slice {
            Some(s)
        } else {
            None
        }
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Branch-free so that loops vectorise: round to nearest even, quiet NaN kept a NaN.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let nan = (bits >> 16) | 0x40;
        let is_nan = (bits & 0x7fff_ffff) > 0x7f80_0000;
        Self::from_bits(if is_nan { nan } else { rounded } as u16)
    }
    fn slice(slice: Slice<'_>) -> Option<&[Self]> {
        if let Slice::Bf16(s) = slice {
            Some(s)
        } else {
            None
        }
    }
    fn slice_mut(slice: SliceMut<'_>) -> Option<&mut [Self]> {
        if let SliceMut::Bf16(s) = slice {
            Some(s)
        } else {
            None
        }
    }
}

/// Runs `$body` with `$T` bound to the element type of `$dtype`.
macro_rules! with_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::Bf16 => {
                type $T = half::bf16;
                $body
            }
        }
    };
}
pub(crate) use with_dtype;

/// Borrowed elements of either dtype.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
}

/// Mutably borrowed elements of either dtype.
#[derive(Debug)]
pub enum SliceMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// bf16 elements.
    Bf16(&'a mut [bf16]),
}

/// Owned elements of either dtype.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// f32 elements.
    F32(Vec<f32>),
    /// bf16 elements.
    Bf16(Vec<bf16>),
}

impl Buffer {
    /// `len` zeros. The pages of a large buffer are only touched when it is written.
    #[must_use]
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::Bf16 => Self::Bf16(bytemuck::allocation::zeroed_vec(len)),
        }
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as little-endian bytes, to be filled by a reader.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(v) => bytemuck::cast_slice_mut(v),
            Self::Bf16(v) => bytemuck::cast_slice_mut(v),
        }
    }
}

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

    /// The whole matrix.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        let len = extent(self.rows, self.cols, self.pitch);
        let data = match &self.buffer {
            Buffer::F32(v) => Slice::F32(&v[..len]),
            Buffer::Bf16(v) => Slice::Bf16(&v[..len]),
        };
        View {
            data,
            rows: self.rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The whole matrix, to be written.
    #[must_use]
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let len = extent(self.rows, self.cols, self.pitch);
        let data = match &mut self.buffer {
            Buffer::F32(v) => SliceMut::F32(&mut v[..len]),
            Buffer::Bf16(v) => SliceMut::Bf16(&mut v[..len]),
        };
        ViewMut {
            data,
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
        let values = self.to_f32_vec();
        match dtype {
            DType::F32 => Self::from_f32(values, self.rows, self.cols),
            DType::Bf16 => {
                let values: Vec<bf16> = values
                    .into_iter()
                    .map(<bf16 as Element>::from_f32)
                    .collect();
                Self::from_buffer(Buffer::Bf16(values), self.rows, self.cols)
            }
        }
    }
}

/// Elements from the first of the first row to the last of the last row.
const fn extent(rows: usize, cols: usize, pitch: usize) -> usize {
    if rows == 0 || cols == 0 {
        0
    } else {
        (rows - 1) * pitch + cols
    }
}

/// A borrowed rectangle.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    data: Slice<'a>,
    rows: usize,
    cols: usize,
    pitch: usize,
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

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self.data {
            Slice::F32(_) => DType::F32,
            Slice::Bf16(_) => DType::Bf16,
        }
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
        let data = match self.data {
            Slice::F32(s) => Slice::F32(&s[start..start + len]),
            Slice::Bf16(s) => Slice::Bf16(&s[start..start + len]),
        };
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
        let data = match self.data {
            Slice::F32(s) => Slice::F32(&s[start..start + len]),
            Slice::Bf16(s) => Slice::Bf16(&s[start..start + len]),
        };
        Self {
            data,
            rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The elements, if they are of type `T`.
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
    #[must_use]
    pub fn to_f32_vec(self) -> Vec<f32> {
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

/// A mutably borrowed rectangle.
#[derive(Debug)]
pub struct ViewMut<'a> {
    data: SliceMut<'a>,
    rows: usize,
    cols: usize,
    pitch: usize,
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

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self.data {
            SliceMut::F32(_) => DType::F32,
            SliceMut::Bf16(_) => DType::Bf16,
        }
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

    /// A shorter borrow of the same rectangle.
    #[must_use]
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        let data = match &mut self.data {
            SliceMut::F32(s) => SliceMut::F32(s),
            SliceMut::Bf16(s) => SliceMut::Bf16(s),
        };
        ViewMut {
            data,
            rows: self.rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The same rectangle, to be read.
    #[must_use]
    pub fn as_view(&self) -> View<'_> {
        let data = match &self.data {
            SliceMut::F32(s) => Slice::F32(s),
            SliceMut::Bf16(s) => Slice::Bf16(s),
        };
        View {
            data,
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
        let data = match self.data {
            SliceMut::F32(s) => SliceMut::F32(&mut s[start..start + len]),
            SliceMut::Bf16(s) => SliceMut::Bf16(&mut s[start..start + len]),
        };
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
        let data = match self.data {
            SliceMut::F32(s) => SliceMut::F32(&mut s[start..start + len]),
            SliceMut::Bf16(s) => SliceMut::Bf16(&mut s[start..start + len]),
        };
        Self {
            data,
            rows,
            cols: self.cols,
            pitch: self.pitch,
        }
    }

    /// The elements, if they are of type `T`.
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
        with_dtype!(self.dtype(), T => {
            if let Some(mut rows) = self.typed::<T>() {
                rows.par_rows_mut().for_each(|row| row.fill(T::from_f32(value)));
            }
        });
    }

    /// Copies `source`, converting the dtype.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn copy_from(self, source: View<'_>) {
        assert_eq!(
            self.shape(),
            source.shape(),
            "ViewMut::copy_from: shapes differ"
        );
        with_dtype!(self.dtype(), D => with_dtype!(source.dtype(), S => {
            if let (Some(mut to), Some(from)) = (self.typed::<D>(), source.typed::<S>()) {
                to.par_rows_mut().enumerate().for_each(|(r, row)| {
                    for (to, from) in row.iter_mut().zip(from.row(r)) {
                        *to = D::from_f32(from.to_f32());
                    }
                });
            }
        }));
    }
}

/// A borrowed rectangle of known element type.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    pitch: usize,
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
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    pitch: usize,
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

#[cfg(test)]
mod tests {
    use super::*;

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
