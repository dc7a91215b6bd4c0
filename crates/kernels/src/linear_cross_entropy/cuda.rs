//! The label rows in chunks: gather, logits, loss and gradient in place, back through the head.
//!
//! Logits are f32 whatever the dtype of the data, so that the loss is the CPU's. The gradient takes
//! their place in the dtype of the head, for the products that follow. Nothing waits for the GPU.

#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

use super::{Accumulator, Gradients, Head, HeadGradients, Labels, PADDING, Update};
use crate::cuda::rows::count;
use crate::cuda::{CudaDevice, Gemm, Grid, Module, Operand};
use crate::error::check_dtype;
use crate::matmul::Layout;
use crate::{DType, Error, Result, Tensor, View, Workspace};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

pub(crate) static MODULE: Module = Module {
    name: "linear_cross_entropy",
    source: include_str!("kernel.cu"),
};

/// Most logits held at once: 512 MiB, which is 1024 rows of 128 Ki tokens.
const CHUNK_LOGITS: usize = 128 << 20;
/// Most label rows of a chunk.
const CHUNK_ROWS: usize = 4096;
/// f64 loss, f64 entropy and u32 hit of a row, in f32s.
const STATISTICS: usize = 5;
const ROW_THREADS: u32 = 256;
const SOFTMAX_THREADS: u32 = 512;

/// What stays the same from chunk to chunk.
struct Run<'a> {
    device: &'a CudaDevice,
    hidden: View<'a>,
    head: Head<'a>,
    /// Label rows and targets on the GPU.
    rows: u64,
    targets: u64,
    /// What the sums are added to.
    total: u64,
    /// Logits between the rows of a chunk.
    pitch: usize,
    smoothing: f32,
}

/// Buffers of a chunk.
struct Buffers {
    logits: Tensor,
    /// Label rows of `hidden`, then their gradient.
    selected: Tensor,
    statistics: Tensor,
    /// Label rows of an update's `s`, then their gradient.
    updated: Option<Tensor>,
}

pub(super) fn run(
    device: &Arc<CudaDevice>,
    hidden: View<'_>,
    head: &Head<'_>,
    labels: Labels<'_>,
    mut gradients: Option<Gradients<'_>>,
    sums: &mut Accumulator,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "linear_cross_entropy";
    let (rows, targets) = (labels.rows, labels.targets);
    let dtype = head.weight.dtype();
    let what = "hidden, to be multiplied by the head,";
    check_dtype(OP, what, dtype, hidden.dtype())?;
    for factor in head.tail.iter().chain(head.update.iter().map(|u| &u.b)) {
        check_dtype(OP, "a piece of the head", dtype, factor.dtype())?;
    }
    if let Some(Gradients { d_hidden, d_head }) = &mut gradients {
        check_dtype(OP, "d_hidden", hidden.dtype(), d_hidden.dtype())?;
        d_hidden.reborrow().fill(0.0);
        if let Some(update) = &mut d_head.update {
            update.s.reborrow().fill(0.0);
        }
    }
    if rows.is_empty() {
        return Ok(());
    }
    let total = match sums.memory() {
        Some(memory) if Arc::ptr_eq(memory.device(), device) => memory.ptr(),
        _ => {
            let message = "sums must be made for the GPU that holds hidden".into();
            return Err(Error::Invalid { op: OP, message });
        }
    };
    let run = Run {
        device,
        hidden,
        head: *head,
        rows: rows.ptr(),
        targets: targets.ptr(),
        total,
        pitch: pitch(head.vocabulary()),
        smoothing: labels.smoothing,
    };
    let limit = chunk_rows(run.pitch).min(rows.len());
    let held = held_rows(run.pitch, rows.len());
    let scratch = |dtype, cols| {
        let buffer = workspace.take_scratch(dtype, held * cols);
        Tensor::from_buffer(buffer, held, cols)
    };
    let mut buffers = Buffers {
        logits: scratch(DType::F32, run.pitch),
        selected: scratch(dtype, hidden.cols()),
        statistics: scratch(DType::F32, STATISTICS),
        updated: head.update.map(|update| scratch(dtype, update.b.cols())),
    };
    for chunk in chunks(rows, limit, hidden.rows()) {
        run.chunk(chunk, &mut buffers, gradients.as_mut())?;
    }
    let Buffers {
        logits,
        selected,
        statistics,
        updated,
    } = buffers;
    for tensor in [logits, selected, statistics].into_iter().chain(updated) {
        workspace.give_scratch(tensor.into_buffer());
    }
    Ok(())
}

/// Bytes of the buffers for these numbers of label rows, none of them zero.
pub(super) fn scratch_bytes(
    dtype: DType,
    [vocabulary, width]: [usize; 2],
    label_rows: impl Iterator<Item = usize>,
) -> usize {
    let pitch = pitch(vocabulary);
    let row = (pitch + STATISTICS) * DType::F32.bytes() + width * dtype.bytes();
    let held: BTreeSet<usize> = label_rows.map(|rows| held_rows(pitch, rows)).collect();
    held.into_iter().map(|rows| rows * row).sum()
}

/// Logits between the rows of a chunk.
fn pitch(vocabulary: usize) -> usize {
    vocabulary.next_multiple_of(8)
}

/// Rows of the buffers for so many label rows: few sizes, so that scratch is used again.
fn held_rows(pitch: usize, label_rows: usize) -> usize {
    let limit = chunk_rows(pitch);
    label_rows.min(limit).next_power_of_two().min(limit)
}

/// Label rows per chunk: as many as fit, 16 at least, a multiple of 16.
fn chunk_rows(pitch: usize) -> usize {
    (CHUNK_LOGITS / pitch).clamp(16, CHUNK_ROWS) / 16 * 16
}

/// Consecutive ranges of at most `limit` of `rows`, in none of which a row comes twice: the gradients
/// of a chunk are added at the same time.
fn chunks(rows: &[u32], limit: usize, tokens: usize) -> Vec<Range<usize>> {
    let mut chunk_of = vec![usize::MAX; tokens];
    let mut chunks: Vec<Range<usize>> = Vec::new();
    for (i, &row) in rows.iter().enumerate() {
        // Padding has no row, and so none that comes twice.
        let seen = |row: u32| chunk_of.get(row as usize).copied().unwrap_or(usize::MAX);
        match chunks.last_mut() {
            Some(last) if last.len() < limit && seen(row) != last.start => last.end = i + 1,
            _ => chunks.push(i..i + 1),
        }
        if let (Some(of), Some(last)) = (chunk_of.get_mut(row as usize), chunks.last()) {
            *of = last.start;
        }
    }
    chunks
}

impl Run<'_> {
    fn chunk(
        &self,
        labels: Range<usize>,
        buffers: &mut Buffers,
        gradients: Option<&mut Gradients<'_>>,
    ) -> Result<()> {
        let len = labels.len();
        let at = |indices: u64| indices + (labels.start * size_of::<u32>()) as u64;
        let rows = rows_of(self.hidden, at(self.rows), buffers.selected.view());
        self.launch_rows("gather", len, &rows)?;
        self.project(len, at(self.rows), buffers)?;
        self.softmax(len, at(self.targets), buffers, gradients.is_some())?;
        match gradients {
            Some(gradients) => self.back(len, at(self.rows), buffers, gradients),
            None => Ok(()),
        }
    }

    /// Logits of the label rows in `selected`.
    fn project(&self, len: usize, rows: u64, buffers: &Buffers) -> Result<()> {
        for (start, weight) in self.pieces() {
            self.product(Product {
                layout: Layout::Nt,
                sizes: [len, weight.rows(), weight.cols()],
                alpha: 1.0,
                beta: 0.0,
                a: operand(buffers.selected.view()),
                b: operand(weight),
                dst: operand(buffers.logits.view()).at_column(start),
            })?;
        }
        let (Some(Update { s, b, scale }), Some(updated)) = (self.head.update, &buffers.updated)
        else {
            return Ok(());
        };
        self.launch_rows("gather", len, &rows_of(s, rows, updated.view()))?;
        self.product(Product {
            layout: Layout::Nt,
            sizes: [len, b.rows(), b.cols()],
            alpha: scale,
            beta: 1.0,
            a: operand(updated.view()),
            b: operand(b),
            dst: operand(buffers.logits.view()),
        })
    }

    /// The pieces of W, each with its first row.
    fn pieces(&self) -> impl Iterator<Item = (usize, View<'_>)> {
        let Head { weight, tail, .. } = self.head;
        std::iter::once((0, weight)).chain(tail.map(|tail| (weight.rows(), tail)))
    }

    /// Losses of the chunk, added to the sums; the gradients of its logits if asked for.
    fn softmax(&self, len: usize, targets: u64, buffers: &Buffers, gradient: bool) -> Result<()> {
        let sums = buffers.statistics.view().ptr();
        let params = Softmax {
            logits: buffers.logits.view().ptr(),
            targets,
            sums,
            correct: sums + (len * size_of::<[f64; 2]>()) as u64,
            pitch: self.pitch as u64,
            vocabulary: count(self.head.vocabulary()),
            padding: PADDING,
            smoothing: self.smoothing,
            softcap: self.head.softcap.unwrap_or(0.0),
        };
        let capped = self.head.softcap.map_or("", |_| "capped_");
        let kernel = match gradient {
            true => format!(
                "linear_cross_entropy_{capped}gradient_{}",
                self.hidden.dtype()
            ),
            false => format!("linear_cross_entropy_{capped}loss"),
        };
        let grid = Grid::new(count(len), SOFTMAX_THREADS);
        self.device.launch(&MODULE, &kernel, grid, &params)?;
        let params = Reduce {
            sums,
            correct: params.correct,
            targets,
            total: self.total,
            rows: count(len),
            padding: PADDING,
        };
        let grid = Grid::new(1, ROW_THREADS);
        self.device
            .launch(&MODULE, "linear_cross_entropy_reduce", grid, &params)
    }

    /// From the gradient of the logits to that of the head and of the hidden rows.
    fn back(
        &self,
        len: usize,
        rows: u64,
        buffers: &mut Buffers,
        gradients: &mut Gradients<'_>,
    ) -> Result<()> {
        let dtype = self.hidden.dtype();
        let d_logits = Operand {
            ptr: buffers.logits.view().ptr(),
            dtype,
            // The rows of a bf16 gradient start where those of the f32 logits did.
            pitch: self.pitch * DType::F32.bytes() / dtype.bytes(),
        };
        let width = self.hidden.cols();
        let HeadGradients { weight, tail, .. } = &gradients.d_head;
        for ((start, _), d) in self.pieces().zip([weight, tail]) {
            let Some(d) = d else { continue };
            self.product(Product {
                layout: Layout::Tn,
                sizes: [d.rows(), width, len],
                alpha: 1.0,
                beta: 1.0,
                a: d_logits.at_column(start),
                b: operand(buffers.selected.view()),
                dst: operand(d.as_view()),
            })?;
        }
        // The hidden rows are not needed any more: their gradient takes their place.
        for (start, weight) in self.pieces() {
            self.product(Product {
                layout: Layout::Nn,
                sizes: [len, width, weight.rows()],
                alpha: 1.0,
                beta: if start == 0 { 0.0 } else { 1.0 },
                a: d_logits.at_column(start),
                b: operand(weight),
                dst: operand(buffers.selected.view()),
            })?;
        }
        let d_hidden = gradients.d_hidden.as_view();
        let to = rows_of(d_hidden, rows, buffers.selected.view());
        self.launch_rows("scatter_add", len, &to)?;
        self.back_update(len, rows, d_logits, buffers, &gradients.d_head)
    }

    /// From the gradient of the logits to those of an update's factors.
    fn back_update(
        &self,
        len: usize,
        rows: u64,
        d_logits: Operand,
        buffers: &Buffers,
        gradients: &HeadGradients<'_>,
    ) -> Result<()> {
        let (Some(Update { b, scale, .. }), Some(updated), Some(gradients)) =
            (self.head.update, &buffers.updated, &gradients.update)
        else {
            return Ok(());
        };
        let [vocabulary, rank] = b.shape();
        self.product(Product {
            layout: Layout::Tn,
            sizes: [vocabulary, rank, len],
            alpha: scale,
            beta: 1.0,
            a: d_logits,
            b: operand(updated.view()),
            dst: operand(gradients.b.as_view()),
        })?;
        self.product(Product {
            layout: Layout::Nn,
            sizes: [len, rank, vocabulary],
            alpha: scale,
            beta: 0.0,
            a: d_logits,
            b: operand(b),
            dst: operand(updated.view()),
        })?;
        let to = rows_of(gradients.s.as_view(), rows, updated.view());
        self.launch_rows("scatter_add", len, &to)
    }

    fn launch_rows(&self, kernel: &str, len: usize, params: &Rows) -> Result<()> {
        let kernel = format!("linear_cross_entropy_{kernel}_{}", self.hidden.dtype());
        let grid = Grid::new(count(len), ROW_THREADS);
        self.device.launch(&MODULE, &kernel, grid, params)
    }

    fn product(&self, product: Product) -> Result<()> {
        let [m, n, k] = product.sizes;
        self.device.gemm(&Gemm {
            layout: product.layout,
            m,
            n,
            k,
            alpha: self.head.scale * product.alpha,
            beta: product.beta,
            a: product.a,
            b: product.b,
            dst: product.dst,
        })
    }
}

/// Rows of `hidden` by number, and where they lie packed.
fn rows_of(hidden: View<'_>, rows: u64, packed: View<'_>) -> Rows {
    let width = hidden.cols() * hidden.dtype().bytes();
    let pitch = hidden.pitch() * hidden.dtype().bytes();
    let aligned = [width, pitch].iter().all(|bytes| bytes.is_multiple_of(16));
    Rows {
        hidden: hidden.ptr(),
        packed: packed.ptr(),
        rows,
        pitch: hidden.pitch() as u64,
        cols: count(hidden.cols()),
        vectors: u32::from(aligned && hidden.ptr().is_multiple_of(16)),
        padding: PADDING,
        unused: 0,
    }
}

struct Product {
    layout: Layout,
    /// M, N, K.
    sizes: [usize; 3],
    alpha: f32,
    beta: f32,
    a: Operand,
    b: Operand,
    dst: Operand,
}

fn operand(view: View<'_>) -> Operand {
    Operand {
        ptr: view.ptr(),
        dtype: view.dtype(),
        pitch: view.pitch(),
    }
}

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Rows {
    hidden: u64,
    packed: u64,
    rows: u64,
    pitch: u64,
    cols: u32,
    vectors: u32,
    padding: u32,
    unused: u32,
}

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Softmax {
    logits: u64,
    targets: u64,
    sums: u64,
    correct: u64,
    pitch: u64,
    vocabulary: u32,
    padding: u32,
    smoothing: f32,
    softcap: f32,
}

/// As in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Reduce {
    sums: u64,
    correct: u64,
    targets: u64,
    total: u64,
    rows: u32,
    padding: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_no_row_twice() {
        assert_eq!(chunks(&[4, 2, 0, 1, 3], 2, 5), [0..2, 2..4, 4..5]);
        assert_eq!(chunks(&[1, 2, 1, 2, 2], 9, 3), [0..2, 2..4, 4..5]);
        assert_eq!(chunks(&[0, 1, 1, 0], 9, 2), [0..2, 2..4]);
        assert_eq!(chunks(&[1, 0, PADDING, PADDING], 3, 2), [0..3, 3..4]);
        assert!(chunks(&[], 9, 2).is_empty());
    }

    #[test]
    fn a_chunk_of_a_large_vocabulary_fits_the_budget() {
        assert_eq!(chunk_rows(128 << 10), 1024);
        assert_eq!(chunk_rows(151_936), 880);
        assert_eq!(chunk_rows(8), 4096);
        assert_eq!(chunk_rows(1 << 30), 16);
    }
}
