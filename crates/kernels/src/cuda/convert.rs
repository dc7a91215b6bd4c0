//! Copies that may change the dtype (`include/convert.cuh`).

use super::Grid;
use super::rows::{Matrix, count, element_grid};

/// How a kernel copies elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    suffix: &'static str,
    group: usize,
}

impl Copy {
    /// Groups, if both matrices are aligned and `cols` is a number of whole groups.
    pub(crate) fn of(from: &Matrix, to: &Matrix, cols: usize) -> Self {
        let (suffix, group) = match (from.suffix(), to.suffix()) {
            ("f32", "f32") => ("f32_f32", 4),
            ("f32", _) => ("f32_bf16", 8),
            (_, "f32") => ("bf16_f32", 8),
            _ => ("bf16_bf16", 8),
        };
        if from.is_aligned() && to.is_aligned() && cols.is_multiple_of(group) {
            Self { suffix, group }
        } else {
            Self {
                suffix: "any",
                group: 1,
            }
        }
    }

    /// The end of a kernel's name.
    pub(crate) fn suffix(self) -> &'static str {
        self.suffix
    }

    /// Groups in `cols` columns.
    pub(crate) fn groups(self, cols: usize) -> u32 {
        count(cols / self.group)
    }

    /// Blocks `[tiles, rows]` whose threads have one group of columns each.
    pub(crate) fn elements(self, rows: usize, cols: usize) -> Grid {
        element_grid(rows, self.groups(cols))
    }
}
