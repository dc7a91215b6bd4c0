//! A micro-batch where the model runs: what a pass reads besides weights.

use super::Model;
use super::angles::{self, Angles};
use super::padding::Padding;
use super::prompt;
use super::rope::RopeConfig;
use super::run::{Mode, Pass};
use crate::adapter::Prompt;
use crate::data::{PackedBatch, padded_rows};
use ferrotune_kernels::linear_cross_entropy::PADDING;
use ferrotune_kernels::{Device, Indices, Tensor, View};
use std::borrow::Cow;
use std::sync::Arc;

/// Numbers of documents are padded to powers of two, and to no fewer.
const FEWEST_DOCUMENTS: usize = 8;

/// A micro-batch with its tables on the device of a model, in one copy.
///
/// For training and evaluation on a GPU it is padded, so that few shapes occur ([`InputShape`]); what
/// changes from one micro-batch to the next is in the tables alone.
#[derive(Debug)]
pub struct Inputs<'a> {
    pub(crate) rows: usize,
    pub(crate) ids: Indices<'a>,
    pub(crate) cu_seqlens: Indices<'a>,
    /// Rows of the angles.
    pub(crate) positions: Indices<'a>,
    /// Of each rope.
    pub(crate) angles: Arc<Vec<Angles>>,
    /// Document and position of each token, side by side, and the step: what its words are drawn for.
    pub(crate) draws: Indices<'a>,
    /// The largest noise of each token's embedding, as the bits of an f32; empty for none.
    pub(crate) noise: Indices<'a>,
    /// Rows that are trained on, and their targets.
    pub(crate) label_rows: Indices<'a>,
    pub(crate) targets: Indices<'a>,
    /// Which virtual token each row is, from 1, where there is a prompt.
    pub(crate) prompt_rows: Indices<'a>,
    /// Where updates do not act, as [`Invocation::silent`] has it, if they act in places.
    silent: Indices<'a>,
    zeros: Option<Arc<Tensor>>,
    /// Padding that is computed.
    pub(crate) padding: Option<Padding>,
}

/// What rows of a micro-batch are marked as; empty where none is.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// Which virtual token each is, from 1.
    pub(crate) prompt_rows: Vec<u32>,
    /// Where updates do not act, by 1.
    pub(crate) silent: Vec<u32>,
}

/// Sizes of a micro-batch with padding: all that its launches depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InputShape {
    /// Tokens.
    pub rows: usize,
    /// Label rows.
    pub label_rows: usize,
    /// Documents.
    pub documents: usize,
}

impl<'a> Inputs<'a> {
    /// `batch` behind the model's prompt, if it has one, and with `padded` with padding in all its tables.
    pub(crate) fn new(model: &Model, pass: Pass<'_>, batch: &'a PackedBatch, padded: bool) -> Self {
        let Some(Prompt { tokens, of, .. }) = model.prompt else {
            let invocation = model.invocation.as_ref();
            let silent = invocation.map(|tokens| tokens.silent(batch, |_| None));
            let marks = Marks {
                silent: silent.unwrap_or_default(),
                ..Marks::default()
            };
            return Self::of(model, pass, &Cow::Borrowed(batch), marks, padded);
        };
        let long = prompt::before_documents(batch, tokens, of);
        let marks = Marks {
            prompt_rows: prompt::prompt_rows(&long, tokens, |_| true),
            ..Marks::default()
        };
        Self::of(model, pass, &Cow::Owned(long), marks, padded)
    }

    /// `batch`, whose rows are as `marks` say.
    pub(crate) fn of(
        model: &Model,
        pass: Pass<'_>,
        batch: &Cow<'a, PackedBatch>,
        marks: Marks,
        padded: bool,
    ) -> Self {
        let Marks {
            mut prompt_rows,
            mut silent,
        } = marks;
        let device = pass.workspace.device();
        let (mut label_rows, mut targets) = match &model.config.classifier {
            Some(classifier) => classifier.targets(batch),
            None => batch.targets(),
        };
        let mut draws = match pass.mode {
            Mode::Eval => Vec::new(),
            Mode::Train { .. } => draws(batch),
        };
        let (angles, mut positions) = angles_of(model, batch, device);
        let mut ids = table(batch, |b| &b.input_ids);
        if let Some(rows) = &model.embedding.table.rows {
            let ids = ids.to_mut().iter_mut();
            ids.for_each(|id| *id = rows.place(*id));
        }
        // Where positions are learned, no angles are looked up by them.
        if let Some(learned) = &model.positions
            && let Some(rows) = &learned.embedding.table.rows
        {
            let positions = positions.to_mut().iter_mut();
            positions.for_each(|position| *position = rows.place(*position));
        }
        if let Some(rows) = &model.head_table().rows {
            targets.iter_mut().for_each(|t| *t = rows.place(*t));
        }
        let mut cu_seqlens = table(batch, |b| &b.cu_seqlens);
        let mut rows = batch.rows();
        if padded && rows > 0 {
            rows = padded_rows(rows);
            let token = ids[0];
            ids.to_mut().resize(rows, token);
            positions.to_mut().resize(rows, 0);
            if !prompt_rows.is_empty() {
                prompt_rows.resize(rows, 0);
            }
            if !silent.is_empty() {
                silent.resize(rows, 1);
            }
            let documents = batch.sequences().max(FEWEST_DOCUMENTS).next_power_of_two();
            cu_seqlens
                .to_mut()
                .resize(documents + 1, batch.tokens() as u32);
            let labels = padded_rows(label_rows.len());
            label_rows.resize(labels, PADDING);
            targets.resize(labels, PADDING);
        }
        let mut noise = Vec::new();
        if let Mode::Train { step, .. } = pass.mode {
            if model.neftune_noise_alpha > 0.0 {
                noise = noise_of(model, batch);
                noise.resize(rows, 0);
            }
            draws.resize(2 * rows, 0);
            draws.push(step as u32);
        }
        let tables = [
            ids,
            cu_seqlens,
            positions,
            draws.into(),
            noise.into(),
            label_rows.into(),
            targets.into(),
            prompt_rows.into(),
            silent.into(),
        ];
        let [
            ids,
            cu_seqlens,
            positions,
            draws,
            noise,
            label_rows,
            targets,
            prompt_rows,
            silent,
        ] = pass.workspace.indices(tables);
        Self {
            rows,
            ids,
            cu_seqlens,
            positions,
            angles,
            draws,
            noise,
            label_rows,
            targets,
            prompt_rows,
            silent,
            zeros: model.invocation.as_ref().map(|of| Arc::clone(&of.zeros)),
            padding: Padding::of(batch, device),
        }
    }

    /// Bounds whose last one ends the rows that are computed.
    pub(crate) fn computed_rows(&self) -> &Indices<'_> {
        let padding = self.padding.as_ref();
        padding.map_or(&self.cu_seqlens, |padding| &padding.computed)
    }

    /// Where updates do not act, and a row of zeros `[1, rank]`; none if they act everywhere.
    pub(crate) fn silent(&self, rank: usize) -> Option<(&Indices<'a>, View<'_>)> {
        let zeros = self.zeros.as_ref()?;
        Some((&self.silent, zeros.view().columns(0..rank)))
    }

    /// Addresses of its tables and of the angles in the memory of a GPU.
    pub(crate) fn addresses(&self) -> [u64; 2] {
        // All tables of angles are made together.
        let angles = self.angles.first().map_or(0, |a| a.cos.view().ptr());
        [self.ids.ptr(), angles]
    }

    /// Its sizes.
    #[must_use]
    pub fn shape(&self) -> InputShape {
        InputShape {
            rows: self.rows,
            label_rows: self.label_rows.len(),
            documents: self.cu_seqlens.len().saturating_sub(1),
        }
    }
}

/// Angles, and the row of each token in their tables.
fn angles_of<'a>(
    model: &Model,
    batch: &Cow<'a, PackedBatch>,
    device: &Device,
) -> (Arc<Vec<Angles>>, Cow<'a, [u32]>) {
    let ropes = &model.config.ropes;
    if ropes.iter().any(RopeConfig::depends_on_length) {
        let angles = Arc::new(angles::by_row(ropes, batch, device));
        return (angles, (0..batch.rows() as u32).collect());
    }
    let last = batch.position_ids.iter().max();
    let positions = last.map_or(0, |last| *last as usize + 1);
    let angles = model.angles.up_to(ropes, device, positions);
    let rows = angle_rows(ropes, &angles, batch);
    let rows = rows.unwrap_or_else(|| table(batch, |b| &b.position_ids));
    (angles, rows)
}

/// A table of the batch, borrowed where the batch is.
fn table<'a>(batch: &Cow<'a, PackedBatch>, of: fn(&PackedBatch) -> &Vec<u32>) -> Cow<'a, [u32]> {
    match batch {
        Cow::Borrowed(batch) => Cow::Borrowed(of(batch)),
        Cow::Owned(batch) => Cow::Owned(of(batch).clone()),
    }
}

/// The row of each token in the tables of angles: its position, behind those of other sets of frequencies;
/// `None` if there is one set, and the position alone counts.
fn angle_rows<'a>(
    ropes: &[RopeConfig],
    angles: &[Angles],
    batch: &PackedBatch,
) -> Option<Cow<'a, [u32]>> {
    let variants = angles::variants(ropes);
    let (1.., Some(table)) = (variants - 1, angles.first()) else {
        return None;
    };
    let positions_each = (table.cos.rows() / variants) as u32;
    let mut rows = batch.position_ids.clone();
    for (bounds, &length) in batch.cu_seqlens.windows(2).zip(&batch.rope_lengths) {
        let variant = ropes.iter().map(|rope| rope.variant(length)).max();
        let first = variant.unwrap_or(0) as u32 * positions_each;
        let document = bounds[0] as usize..bounds[1] as usize;
        rows[document].iter_mut().for_each(|row| *row += first);
    }
    for (row, length) in batch.computed_padding() {
        let variant = ropes.iter().map(|rope| rope.variant(length)).max();
        rows[row] += variant.unwrap_or(0) as u32 * positions_each;
    }
    Some(rows.into())
}

/// The largest noise of each token: `alpha / sqrt(T * D)` in a document of T tokens, times what the output of
/// the embedding module is multiplied by. Virtual tokens have none, and are not counted.
fn noise_of(model: &Model, batch: &PackedBatch) -> Vec<u32> {
    let width = model.config.hidden_size as f64;
    let after = (model.config.embedding_scale).filter(|scale| !scale.in_module);
    let alpha = f64::from(model.neftune_noise_alpha * after.map_or(1.0, |scale| scale.factor));
    let documents = batch
        .cu_seqlens
        .windows(2)
        .map(|bounds| bounds[1] - bounds[0]);
    let prompt = model.prompt.map_or(0, |prompt| prompt.tokens);
    let of_document = |tokens: u32| {
        let tokens = tokens as usize - prompt;
        let largest = alpha / (tokens as f64 * width).sqrt();
        let none = std::iter::repeat_n(0.0_f32.to_bits(), prompt);
        none.chain(std::iter::repeat_n((largest as f32).to_bits(), tokens))
    };
    documents.flat_map(of_document).collect()
}

fn draws(batch: &PackedBatch) -> Vec<u32> {
    let mut draws = Vec::with_capacity(2 * batch.rows() + 1);
    for (s, bounds) in batch.cu_seqlens.windows(2).enumerate() {
        let id = batch.sequence_ids[s] as u32;
        draws.extend((0..bounds[1] - bounds[0]).flat_map(|position| [id, position]));
    }
    draws.resize(2 * batch.rows(), 0);
    draws
}
