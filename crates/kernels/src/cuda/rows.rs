//! Matrices as kernels see them (`include/rows.cuh`), and the grids of row-wise kernels.

use super::Grid;
use crate::{DType, View};

/// Groups of elements that a thread of a row team holds in registers.
const TEAM_SLOTS: u32 = 2;
const WARP: u32 = 32;
/// Threads of a block of [`Access::elements`], and of one whose warps have a row each.
const ELEMENT_THREADS: u32 = 256;
const WARP_TEAM_THREADS: u32 = 128;
/// Most blocks in y.
const MAX_BLOCKS_Y: u32 = 65_535;

/// A matrix in the memory of a GPU; `struct Matrix` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Matrix {
    data: u64,
    pitch: u64,
    is_bf16: u32,
    unused: u32,
}

impl Matrix {
    /// The rectangle of `view`, which a GPU holds.
    pub(crate) fn of(view: View<'_>) -> Self {
        Self {
            data: view.ptr(),
            pitch: view.pitch() as u64,
            is_bf16: u32::from(view.dtype() == DType::Bf16),
            unused: 0,
        }
    }

    /// Its dtype in the name of a kernel.
    pub(crate) fn suffix(&self) -> &'static str {
        if self.is_bf16 == 1 { "bf16" } else { "f32" }
    }

    /// Whether every row starts on 16 bytes.
    pub(crate) fn is_aligned(&self) -> bool {
        let element_bytes = if self.is_bf16 == 1 { 2 } else { 4 };
        is_aligned(self.data) && is_aligned(self.pitch * element_bytes)
    }
}

/// Whether 16 bytes can be read at `address`.
fn is_aligned(address: u64) -> bool {
    address.is_multiple_of(16)
}

/// A count of rows, columns or elements as kernels take it.
pub(crate) fn count(value: usize) -> u32 {
    u32::try_from(value).expect("a matrix has fewer than 2^32 rows and columns")
}

/// How a kernel reads its matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Groups of four f32.
    F32,
    /// Groups of eight bf16.
    Bf16,
    /// Single elements of whichever dtype each matrix has.
    Any,
}

impl Access {
    /// Groups of 16 bytes, if all `matrices` have one dtype, they and the f32 `vectors` (addresses)
    /// are aligned, and all `widths` are whole groups.
    pub(crate) fn of(matrices: &[Matrix], vectors: &[u64], widths: &[usize]) -> Self {
        let packed = match matrices.first() {
            Some(first) if first.is_bf16 == 1 => Self::Bf16,
            _ => Self::F32,
        };
        let fits = matrices
            .iter()
            .all(|m| m.is_aligned() && m.is_bf16 == matrices[0].is_bf16)
            && vectors.iter().all(|&vector| is_aligned(vector))
            && widths.iter().all(|w| w.is_multiple_of(packed.group()));
        if fits { packed } else { Self::Any }
    }

    /// The end of a kernel's name.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Any => "any",
        }
    }

    /// Elements of a group.
    pub(crate) fn group(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 8,
            Self::Any => 1,
        }
    }

    /// Groups in `cols` columns.
    pub(crate) fn groups(self, cols: usize) -> u32 {
        count(cols / self.group())
    }

    /// Threads that share a row of `cols` columns, and the grid for `rows` of them.
    pub(crate) fn row_teams(self, rows: usize, cols: usize) -> (u32, Grid) {
        let threads = self.groups(cols).div_ceil(TEAM_SLOTS);
        let team = threads.next_multiple_of(WARP).clamp(WARP, 1024);
        let grid = if team == WARP {
            let rows_per_block = WARP_TEAM_THREADS / WARP;
            Grid::new(count(rows).div_ceil(rows_per_block), WARP_TEAM_THREADS)
        } else {
            Grid::new(count(rows), team)
        };
        (team, grid)
    }

    /// Blocks `[tiles, rows]` whose threads have one group of columns each.
    pub(crate) fn elements(self, rows: usize, cols: usize) -> Grid {
        element_grid(rows, self.groups(cols))
    }
}

/// Blocks `[tiles, rows]` whose threads have one of `groups` each; at the most rows that a grid can
/// have, they go on with the rows after those.
pub(crate) fn element_grid(rows: usize, groups: u32) -> Grid {
    let threads = groups.next_multiple_of(WARP).clamp(WARP, ELEMENT_THREADS);
    let rows = count(rows).min(MAX_BLOCKS_Y);
    Grid::new([groups.div_ceil(threads), rows], threads)
}

/// Threads that share a row of `groups`, and blocks `[tiles, rows]` of as many rows as have room; at the
/// most blocks that a grid can have, they go on with the rows after those. For narrow rows, of which
/// [`element_grid`] gives each a block.
pub(crate) fn shared_rows(rows: usize, groups: u32) -> (u32, Grid) {
    let threads = groups.next_power_of_two().min(ELEMENT_THREADS);
    let blocks = count(rows).div_ceil(ELEMENT_THREADS / threads);
    let blocks = [groups.div_ceil(threads), blocks.min(MAX_BLOCKS_Y)];
    (threads, Grid::new(blocks, ELEMENT_THREADS))
}

/// Blocks of 32 columns for `add_column_sums`.
pub(crate) fn column_sums(cols: usize) -> Grid {
    Grid::new(count(cols).div_ceil(WARP), 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(data: u64, pitch: u64, is_bf16: u32) -> Matrix {
        Matrix {
            data,
            pitch,
            is_bf16,
            unused: 0,
        }
    }

    #[test]
    fn groups_need_one_dtype_alignment_and_whole_groups() {
        let (wide, narrow) = (matrix(256, 24, 0), matrix(512, 24, 1));
        assert_eq!(Access::of(&[wide, wide], &[16], &[24]), Access::F32);
        assert_eq!(Access::of(&[narrow], &[], &[16]), Access::Bf16);
        assert_eq!(Access::of(&[wide, narrow], &[], &[16]), Access::Any);
        assert_eq!(Access::of(&[wide], &[4], &[16]), Access::Any);
        assert_eq!(Access::of(&[narrow], &[], &[12]), Access::Any);
        assert_eq!(Access::of(&[matrix(260, 24, 0)], &[], &[16]), Access::Any);
        assert_eq!(Access::of(&[matrix(256, 20, 1)], &[], &[16]), Access::Any);
    }

    #[test]
    fn every_row_and_group_has_a_thread() {
        for (rows, cols) in [(0, 8), (1, 8), (7, 520), (100_000, 4096), (3, 40_000)] {
            for access in [Access::F32, Access::Bf16, Access::Any] {
                let (team, grid) = access.row_teams(rows, cols);
                let rows_per_block = if team == WARP { grid.threads / WARP } else { 1 };
                let [blocks, 1, 1] = grid.blocks else {
                    panic!("row teams have blocks in x only")
                };
                assert!((blocks * rows_per_block) as usize >= rows && grid.threads <= 1024);
                let (threads, grid) = shared_rows(rows, access.groups(cols));
                let together = grid.threads / threads;
                assert!(grid.blocks[0] * threads >= access.groups(cols));
                assert!((grid.blocks[1] * together) as usize >= rows.min(65_535));
                let grid = access.elements(rows, cols);
                assert!((grid.blocks[0] * grid.threads) as usize * access.group() >= cols);
                assert_eq!(grid.blocks[1] as usize, rows.min(65_535));
            }
        }
    }
}
