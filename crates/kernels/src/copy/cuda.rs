#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::transfer::rectangle;
use crate::cuda::convert::Copy;
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Module};
use crate::{Result, View, ViewMut};
use std::ops::Range;

pub(crate) static MODULE: Module = Module {
    name: "copy",
    source: include_str!("kernel.cu"),
};

/// Most columns of one launch, a whole number of groups: kernels count in 32 bits, and a flat buffer is
/// one row of any length.
const LONGEST_ROW: usize = 1 << 30;

/// Columns 0 to `cols` in pieces of at most `longest`.
fn pieces(cols: usize, longest: usize) -> impl Iterator<Item = Range<usize>> {
    (0..cols)
        .step_by(longest)
        .map(move |start| start..cols.min(start + longest))
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct FillParams {
    to: Matrix,
    rows: u32,
    cols: u32,
    value: f32,
    unused: u32,
}

pub(super) fn fill(device: &CudaDevice, to: ViewMut<'_>, value: f32) -> Result<()> {
    let [rows, cols] = to.shape();
    if value.to_bits() == 0 && to.pitch() == cols {
        return device.fill_zero(to.ptr(), rows * cols * to.dtype().bytes());
    }
    for columns in pieces(cols, LONGEST_ROW) {
        fill_piece(device, to.as_view().columns(columns), value)?;
    }
    Ok(())
}

fn fill_piece(device: &CudaDevice, to: View<'_>, value: f32) -> Result<()> {
    let [rows, cols] = to.shape();
    let params = FillParams {
        to: Matrix::of(to),
        rows: count(rows),
        cols: count(cols),
        value,
        unused: 0,
    };
    let access = Access::of(&[params.to], &[], &[cols]);
    let kernel = format!("fill_{}", access.suffix());
    device.launch(&MODULE, &kernel, access.elements(rows, cols), &params)
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CopyParams {
    from: Matrix,
    to: Matrix,
    rows: u32,
    cols: u32,
}

/// Copies within `device`.
pub(super) fn copy(device: &CudaDevice, to: ViewMut<'_>, from: View<'_>) -> Result<()> {
    if to.dtype() == from.dtype() {
        return device.copy_2d(to.ptr(), from.ptr(), rectangle(to.as_view(), from));
    }
    convert(device, to, from, LONGEST_ROW)
}

/// Copies to another dtype, at most `longest` columns at a time.
pub(super) fn convert(
    device: &CudaDevice,
    to: ViewMut<'_>,
    from: View<'_>,
    longest: usize,
) -> Result<()> {
    for columns in pieces(from.cols(), longest) {
        let to = to.as_view().columns(columns.clone());
        convert_piece(device, to, from.columns(columns))?;
    }
    Ok(())
}

fn convert_piece(device: &CudaDevice, to: View<'_>, from: View<'_>) -> Result<()> {
    let [rows, cols] = from.shape();
    let params = CopyParams {
        from: Matrix::of(from),
        to: Matrix::of(to),
        rows: count(rows),
        cols: count(cols),
    };
    let copy = Copy::of(&params.from, &params.to, cols);
    let kernel = format!("copy_{}", copy.suffix());
    device.launch(&MODULE, &kernel, copy.elements(rows, cols), &params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_buffer_of_any_length_is_copied_in_pieces_that_kernels_can_count() {
        let cols = (1 << 32) + 5;
        let pieces: Vec<_> = pieces(cols, LONGEST_ROW).collect();
        assert_eq!((pieces.len(), pieces[0].start, pieces[4].end), (5, 0, cols));
        assert!(
            pieces
                .iter()
                .all(|piece| u32::try_from(piece.len()).is_ok())
        );
        assert!(pieces.windows(2).all(|two| two[0].end == two[1].start));
        assert_eq!(super::pieces(0, LONGEST_ROW).count(), 0);
    }
}
