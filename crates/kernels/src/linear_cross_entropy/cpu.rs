use super::softmax::{Lane, Loss, cap, means, statistics, to_gradients};
use super::{Gradients, Head, HeadGradients, Labels, Sums, Update, UpdateGradients};
use crate::matmul::block::view_flipped;
use crate::tensor::with_dtype;
use crate::{DType, Element, Result, Tensor, View, ViewMut, Workspace, matmul};

/// Most logits held at once: 32 MiB of f32.
const CHUNK_LOGITS: usize = 8 << 20;
/// Most label rows of a chunk.
const CHUNK_ROWS: usize = 256;

/// `count` label rows stand before the padding.
pub(super) fn run(
    hidden: View<'_>,
    head: &Head<'_>,
    labels: Labels<'_>,
    count: usize,
    mut gradients: Option<Gradients<'_>>,
    workspace: &Workspace,
) -> Result<Sums> {
    let (rows, targets) = (&labels.rows[..count], &labels.targets[..count]);
    let smoothing = labels.smoothing;
    if let Some(gradients) = &mut gradients {
        gradients.d_hidden.reborrow().fill(0.0);
    }
    let mut sums = Sums::default();
    let (vocabulary, width) = (head.vocabulary(), hidden.cols());
    let limit = chunk_rows(vocabulary);
    if let Some(update) = gradients.as_mut().and_then(|g| g.d_head.update.as_mut()) {
        update.s.reborrow().fill(0.0);
    }
    if rows.is_empty() {
        return Ok(sums);
    }
    let mut buffer = workspace.take_scratch(DType::F32, vocabulary * limit);
    for (rows, targets) in rows.chunks(limit).zip(targets.chunks(limit)) {
        let mut selected = workspace.take(DType::F32, rows.len(), width);
        gather(hidden, rows, &mut selected);
        let transposed = transpose(&selected, workspace);
        let mut logits = Tensor::from_buffer(buffer, vocabulary, rows.len());
        let updated = project(head, transposed.view(), rows, &mut logits, workspace)?;
        // In the shape it was taken in: the pool goes by columns.
        let transposed = Tensor::from_buffer(transposed.into_buffer(), rows.len(), width);
        workspace.give(transposed);
        if let Some(softcap) = head.softcap {
            cap(logits.view_mut(), softcap);
        }
        let lanes = statistics(logits.view());
        add_sums(&mut sums, &lanes, &logits, targets);
        if smoothing > 0.0 {
            smooth(&mut sums, &logits, targets, smoothing);
        }
        if let Some(Gradients { d_hidden, d_head }) = &mut gradients {
            let loss = Loss {
                targets,
                smoothing,
                softcap: head.softcap,
            };
            to_gradients(logits.view_mut(), &lanes, loss);
            back(head, &logits, &mut selected, d_head)?;
            scatter_add(&selected, rows, d_hidden.reborrow());
        }
        if let (Some(s), Some(update)) = (updated, head.update) {
            let d_update = gradients.as_mut().and_then(|g| g.d_head.update.as_mut());
            if let Some(d_update) = d_update {
                back_update(head.scale, update, &logits, rows, &s, d_update, workspace)?;
            }
            workspace.give(s);
        }
        buffer = logits.into_buffer();
        workspace.give(selected);
    }
    workspace.give_scratch(buffer);
    Ok(sums)
}

/// Logits `[V, rows]` of the label rows that `transposed` `[D, rows]` holds, and the rows of `s` that an
/// update took for them.
fn project(
    head: &Head<'_>,
    transposed: View<'_>,
    rows: &[u32],
    logits: &mut Tensor,
    workspace: &Workspace,
) -> Result<Option<Tensor>> {
    let [vocabulary, first] = [logits.rows(), head.weight.rows()];
    let to = logits.view_mut().row_range(0..first);
    matmul::nn(to, 0.0, head.scale, head.weight, transposed)?;
    if let Some(tail) = head.tail {
        let to = logits.view_mut().row_range(first..vocabulary);
        matmul::nn(to, 0.0, head.scale, tail, transposed)?;
    }
    let Some(update) = head.update else {
        return Ok(None);
    };
    let mut s = workspace.take(DType::F32, rows.len(), update.s.cols());
    gather(update.s, rows, &mut s);
    let scale = head.scale * update.scale;
    matmul::nt(logits.view_mut(), 1.0, scale, update.b, s.view())?;
    Ok(Some(s))
}

/// From the gradient of the logits `[V, rows]` to that of W, and to that of the hidden rows, which takes
/// their place in `selected` `[rows, D]`.
fn back(
    head: &Head<'_>,
    logits: &Tensor,
    selected: &mut Tensor,
    d_head: &mut HeadGradients<'_>,
) -> Result<()> {
    let first = head.weight.rows();
    let pieces = [0..first, first..logits.rows()].map(|rows| logits.view().row_range(rows));
    for (d, piece) in [&mut d_head.weight, &mut d_head.tail]
        .into_iter()
        .zip(pieces)
    {
        if let Some(d) = d {
            matmul::nn(d.reborrow(), 1.0, head.scale, piece, selected.view())?;
        }
    }
    let scale = head.scale;
    matmul::tn(selected.view_mut(), 0.0, scale, pieces[0], head.weight)?;
    if let Some(tail) = head.tail {
        matmul::tn(selected.view_mut(), 1.0, scale, pieces[1], tail)?;
    }
    Ok(())
}

/// The same to that of an update's factors; `s` `[rows, R]` are the label rows of its own.
fn back_update(
    head_scale: f32,
    update: Update<'_>,
    logits: &Tensor,
    rows: &[u32],
    s: &Tensor,
    gradients: &mut UpdateGradients<'_>,
    workspace: &Workspace,
) -> Result<()> {
    let (d_b, scale) = (gradients.b.reborrow(), head_scale * update.scale);
    matmul::nn(d_b, 1.0, scale, logits.view(), s.view())?;
    let mut d_s = workspace.take(DType::F32, s.rows(), s.cols());
    matmul::tn(d_s.view_mut(), 0.0, scale, logits.view(), update.b)?;
    scatter_add(&d_s, rows, gradients.s.reborrow());
    workspace.give(d_s);
    Ok(())
}

/// Bytes of the chunk's logits.
pub(super) fn scratch_bytes(vocabulary: usize) -> usize {
    vocabulary * chunk_rows(vocabulary) * DType::F32.bytes()
}

/// Label rows per chunk: as many as fit, 16 at least, a multiple of 16.
fn chunk_rows(vocabulary: usize) -> usize {
    let rows = (CHUNK_LOGITS / vocabulary.max(1)).clamp(16, CHUNK_ROWS);
    rows / 16 * 16
}

fn gather(source: View<'_>, rows: &[u32], to: &mut Tensor) {
    with_dtype!(source.dtype(), T => {
        if let (Some(source), Some(mut to)) = (source.typed::<T>(), to.view_mut().typed::<f32>()) {
            for (i, &row) in rows.iter().enumerate() {
                for (to, from) in to.row_mut(i).iter_mut().zip(source.row(row as usize)) {
                    *to = from.to_f32();
                }
            }
        }
    });
}

/// The label rows as the columns of `[D, N]`, once per chunk instead of once per block of the head.
fn transpose(selected: &Tensor, workspace: &Workspace) -> Tensor {
    let (rows, width) = (selected.rows(), selected.cols());
    let buffer = workspace.take(DType::F32, rows, width).into_buffer();
    let mut transposed = Tensor::from_buffer(buffer, width, rows);
    if let Some(mut to) = transposed.view_mut().typed::<f32>() {
        view_flipped(selected.view(), 0..rows, 0..width, to.data_mut());
    }
    transposed
}

/// `to[rows[i]] += source[i]`.
fn scatter_add(source: &Tensor, rows: &[u32], to: ViewMut<'_>) {
    with_dtype!(to.dtype(), T => {
        if let (Some(source), Some(mut to)) = (source.view().typed::<f32>(), to.typed::<T>()) {
            for (i, &row) in rows.iter().enumerate() {
                for (to, from) in to.row_mut(row as usize).iter_mut().zip(source.row(i)) {
                    *to = T::from_f32(to.to_f32() + from);
                }
            }
        }
    });
}

/// Adds the chunk's rows in their order.
fn add_sums(sums: &mut Sums, lanes: &[Lane], logits: &Tensor, targets: &[u32]) {
    let Some(logits) = logits.view().typed::<f32>() else {
        unreachable!("the chunk of logits is f32");
    };
    for (i, (lane, &target)) in lanes.iter().zip(targets).enumerate() {
        let logit = logits.row(target as usize)[i];
        *sums += lane.sums(logit, target);
    }
}

/// Adds what label smoothing changes in the chunk's losses.
fn smooth(sums: &mut Sums, logits: &Tensor, targets: &[u32], smoothing: f32) {
    let means = means(logits.view());
    let Some(logits) = logits.view().typed::<f32>() else {
        unreachable!("the chunk of logits is f32");
    };
    for (i, (&target, mean)) in targets.iter().zip(means).enumerate() {
        let logit = f64::from(logits.row(target as usize)[i]);
        sums.loss += f64::from(smoothing) * (logit - mean);
    }
}
