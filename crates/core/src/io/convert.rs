//! Tensor data from a file straight into its place, converted piece by piece.

use super::FileDType;
use super::position::read_exact_at;
use bytemuck::Pod;
use ferrotune_kernels::{DType, Element, RowsMut, ViewMut};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use std::fs::File;
use std::io;

/// Bytes that one task reads at a time: long enough for the disk, short enough for the cache.
const PIECE_BYTES: usize = 1 << 20;

/// Values widened at a time, to stay in the first cache.
const WIDE: usize = 1024;

/// An element type that weights come in.
trait Stored: Pod + Default + Send + Sync {
    const DTYPE: FileDType;
    /// Widens to f32, exactly. Both slices have one length.
    fn widen(values: &[Self], wide: &mut [f32]);
}

impl Stored for f32 {
    const DTYPE: FileDType = FileDType::F32;
    fn widen(values: &[Self], wide: &mut [f32]) {
        wide.copy_from_slice(values);
    }
}

impl Stored for bf16 {
    const DTYPE: FileDType = FileDType::BF16;
    fn widen(values: &[Self], wide: &mut [f32]) {
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = Element::to_f32(*value);
        }
    }
}

impl Stored for f16 {
    const DTYPE: FileDType = FileDType::F16;
    fn widen(values: &[Self], wide: &mut [f32]) {
        // By the slice: one check for the instruction instead of one for each value.
        values.convert_to_f32_slice(wide);
    }
}

/// Whether [`read_rows`] takes this dtype.
pub(super) fn is_float(dtype: FileDType) -> bool {
    matches!(dtype, FileDType::F32 | FileDType::F16 | FileDType::BF16)
}

/// Fills `dst` `[rows, cols]` with the `rows * cols` elements of type `dtype` (see [`is_float`])
/// that lie back to back from `offset` on.
pub(super) fn read_rows(
    file: &File,
    offset: u64,
    dtype: FileDType,
    dst: ViewMut<'_>,
) -> io::Result<()> {
    match dst.dtype() {
        DType::F32 => read_rows_to::<f32>(file, offset, dtype, dst),
        DType::Bf16 => read_rows_to::<bf16>(file, offset, dtype, dst),
    }
}

fn read_rows_to<D: Element>(
    file: &File,
    offset: u64,
    dtype: FileDType,
    dst: ViewMut<'_>,
) -> io::Result<()> {
    let Some(rows) = dst.typed::<D>() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if rows.rows() == 0 || rows.cols() == 0 {
        return Ok(());
    }
    match dtype {
        FileDType::F32 => read_typed::<f32, D>(file, offset, rows),
        FileDType::BF16 => read_typed::<bf16, D>(file, offset, rows),
        FileDType::F16 => read_typed::<f16, D>(file, offset, rows),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Whether bytes of the file are the bytes of memory.
fn same_bits<S: Stored, D: Element>() -> bool {
    matches!(
        (S::DTYPE, D::DTYPE),
        (FileDType::F32, DType::F32) | (FileDType::BF16, DType::Bf16)
    )
}

fn read_typed<S: Stored, D: Element>(
    file: &File,
    offset: u64,
    mut dst: RowsMut<'_, D>,
) -> io::Result<()> {
    let (cols, pitch) = (dst.cols(), dst.pitch());
    let size = size_of::<S>();
    if pitch == cols {
        let piece = PIECE_BYTES / size;
        return dst
            .data_mut()
            .par_chunks_mut(piece)
            .enumerate()
            .try_for_each_init(Vec::new, |buffer, (i, chunk)| {
                let at = offset + (i * piece * size) as u64;
                if same_bits::<S, D>() {
                    read_exact_at(file, bytemuck::cast_slice_mut(chunk), at)
                } else {
                    read_converted::<S>(file, at, buffer, chunk.len(), |from| {
                        convert(from, chunk);
                    })
                }
            });
    }
    let rows_per_piece = (PIECE_BYTES / (cols * size)).max(1);
    dst.data_mut()
        .par_chunks_mut(rows_per_piece * pitch)
        .enumerate()
        .try_for_each_init(Vec::new, |buffer, (i, chunk)| {
            let at = offset + (i * rows_per_piece * cols * size) as u64;
            let rows = chunk.len().div_ceil(pitch);
            read_converted::<S>(file, at, buffer, rows * cols, |from| {
                for (from, row) in from.chunks(cols).zip(chunk.chunks_mut(pitch)) {
                    convert(from, &mut row[..cols]);
                }
            })
        })
}

/// Reads `len` elements into `buffer` and hands them to `place`.
fn read_converted<S: Stored>(
    file: &File,
    offset: u64,
    buffer: &mut Vec<S>,
    len: usize,
    place: impl FnOnce(&[S]),
) -> io::Result<()> {
    buffer.resize(len, S::default());
    read_exact_at(file, bytemuck::cast_slice_mut(buffer), offset)?;
    place(buffer);
    Ok(())
}

fn convert<S: Stored, D: Element>(from: &[S], to: &mut [D]) {
    if same_bits::<S, D>() {
        to.copy_from_slice(bytemuck::cast_slice(from));
        return;
    }
    let mut wide = [0.0; WIDE];
    for (from, to) in from.chunks(WIDE).zip(to.chunks_mut(WIDE)) {
        let wide = &mut wide[..from.len()];
        S::widen(from, wide);
        for (to, value) in to.iter_mut().zip(wide) {
            *to = D::from_f32(*value);
        }
    }
}
