use super::Factors;
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{Result, View, ViewMut};

pub(crate) static MODULE: Module = Module {
    name: "augmented_linear",
    source: include_str!("kernel.cu"),
};

const THREADS: u32 = 256;
/// Updates of one launch.
const MOST: usize = 4;
/// Blocks of one update, or of a copy, at most; their threads go on with what lies behind.
const MOST_BLOCKS: u32 = 1024;

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Update {
    a: u64,
    b: u64,
    rank: u32,
    rows: u32,
    row: u32,
    first: u32,
    scale: f32,
    unused: u32,
}

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Place {
    weight: Matrix,
    updates: [Update; MOST],
    out: u32,
    inputs: u32,
}

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Copy {
    to: Matrix,
    from: Matrix,
    rows: u32,
    cols: u32,
}

impl Update {
    fn of(factors: &Factors<'_>) -> Self {
        Self {
            a: factors.a.ptr(),
            b: factors.b.ptr(),
            rank: count(factors.a.rows()),
            rows: count(factors.b.rows()),
            row: count(factors.row),
            first: count(factors.rank),
            scale: factors.scale,
            unused: 0,
        }
    }
}

fn grid(items: usize, updates: usize) -> Grid {
    let blocks = count(items.div_ceil(THREADS as usize)).min(MOST_BLOCKS);
    Grid::new([blocks, count(updates)], THREADS)
}

pub(super) fn place(
    device: &CudaDevice,
    weight: &mut ViewMut<'_>,
    [out, inputs]: [usize; 2],
    updates: &[Factors<'_>],
) -> Result<()> {
    for updates in updates.chunks(MOST) {
        let mut all = [bytemuck::Zeroable::zeroed(); MOST];
        for (to, factors) in all.iter_mut().zip(updates) {
            *to = Update::of(factors);
        }
        let items = updates
            .iter()
            .map(|u| u.a.rows() * inputs + u.b.rows() * u.b.cols());
        let params = Place {
            weight: Matrix::of(weight.as_view()),
            updates: all,
            out: count(out),
            inputs: count(inputs),
        };
        let grid = grid(items.max().unwrap_or(0), updates.len());
        device.launch(&MODULE, "augmented_linear_place", grid, &params)?;
    }
    Ok(())
}

pub(super) fn copy(device: &CudaDevice, to: &mut ViewMut<'_>, from: View<'_>) -> Result<()> {
    let [rows, cols] = from.shape();
    let params = Copy {
        to: Matrix::of(to.as_view()),
        from: Matrix::of(from),
        rows: count(rows),
        cols: count(cols),
    };
    let access = Access::of(&[params.to, params.from], &[], &[cols]);
    let kernel = format!("augmented_linear_copy_{}", access.suffix());
    device.launch(
        &MODULE,
        &kernel,
        grid(rows * cols / access.group(), 1),
        &params,
    )
}
