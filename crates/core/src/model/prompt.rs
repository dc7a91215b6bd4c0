//! Virtual tokens before documents: rows of the embedding, or of keys and values, that are trained.
//!
//! They are tokens like others to everything in between: documents become longer, and what their rows hold
//! is overlaid where the method says.

use super::config::DecoderConfig;
use super::layer::Layer;
use super::run::Run;
use crate::Result;
use crate::adapter::{Prompt, PromptOf};
use crate::data::{IGNORE_INDEX, PackedBatch};
use crate::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{DType, Tensor, View, Workspace, axpby, embedding};
use std::ops::Range;

/// The token whose embedding a virtual token has until it is overlaid.
pub(crate) const PLACEHOLDER: u32 = 0;
/// In tables of prompt rows, a token of the document; the rows themselves are counted from 1.
const FIRST: usize = 1;

/// `batch` with `tokens` virtual tokens before each document.
pub(crate) fn before_documents(batch: &PackedBatch, tokens: usize, of: PromptOf) -> PackedBatch {
    let mut long = PackedBatch {
        cu_seqlens: vec![0],
        sequence_ids: batch.sequence_ids.clone(),
        ..PackedBatch::default()
    };
    let shift = tokens as u32;
    for (bounds, length) in batch.cu_seqlens.windows(2).zip(&batch.rope_lengths) {
        let document = bounds[0] as usize..bounds[1] as usize;
        let virtual_tokens = long.input_ids.len() + tokens;
        long.input_ids.resize(virtual_tokens, PLACEHOLDER);
        long.labels.resize(virtual_tokens, IGNORE_INDEX);
        long.position_ids.extend(0..shift);
        long.input_ids
            .extend_from_slice(&batch.input_ids[document.clone()]);
        let first = long.labels.len();
        long.labels
            .extend_from_slice(&batch.labels[document.clone()]);
        // Keys and values have no output that could predict a document's first token.
        if let (PromptOf::KeysAndValues, Some(label)) = (of, long.labels.get_mut(first)) {
            *label = IGNORE_INDEX;
        }
        let positions = batch.position_ids[document].iter();
        long.position_ids
            .extend(positions.map(|position| position + shift));
        long.cu_seqlens.push(long.input_ids.len() as u32);
        long.rope_lengths.push(length + shift);
    }
    let padding = batch.rows() - batch.tokens();
    let rows = long.rows() + padding;
    long.padded_to(rows)
}

/// For each row of `batch`, which virtual token it is, from 1; 0 for a token of a document. Documents for
/// which `begins` says no have none.
pub(crate) fn prompt_rows(
    batch: &PackedBatch,
    tokens: usize,
    begins: impl Fn(usize) -> bool,
) -> Vec<u32> {
    let mut rows = vec![0; batch.rows()];
    for (s, bounds) in batch.cu_seqlens.windows(2).enumerate() {
        if begins(s) {
            let document = rows[bounds[0] as usize..].iter_mut().take(tokens);
            document.zip(1..).for_each(|(row, number)| *row = number);
        }
    }
    rows
}

/// A prompt of embeddings, as the stream before the first layer has it.
#[derive(Debug)]
pub(crate) struct EmbeddedPrompt {
    pub(crate) rows: ParamId,
    /// Whether the model scales prompts too, and not the embedding's own rows alone.
    pub(crate) scaled: bool,
}

impl EmbeddedPrompt {
    /// The prompt of `prompt` in a model of `config`, if it is one of embeddings.
    pub(crate) fn new(prompt: &Prompt, config: &DecoderConfig) -> Option<Self> {
        // Gemma's embedding module scales, Granite's model.
        let scaled = config.embedding_scale.is_some_and(|scale| !scale.in_module);
        let rows = prompt.rows;
        (prompt.of == PromptOf::Embeddings).then_some(Self { rows, scaled })
    }

    /// Overlays the prompt's rows on the stream.
    pub(crate) fn place(&self, run: &Run<'_>, stream: &mut Tensor) -> Result<()> {
        let rows = run.params.view_as(self.rows, run.dtype);
        Ok(embedding::overlay(
            rows,
            FIRST,
            &run.inputs.prompt_rows,
            stream.view_mut(),
        )?)
    }

    pub(crate) fn backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        d_stream: View<'_>,
    ) -> Result<()> {
        let (ids, to) = (&run.inputs.prompt_rows, grads.view_mut(self.rows));
        Ok(embedding::overlay_backward(d_stream, FIRST, ids, to)?)
    }
}

/// Keys and values of a prompt in one layer.
#[derive(Debug)]
pub(crate) struct Prefix {
    rows: ParamId,
    tokens: usize,
    /// Columns of `rows`.
    keys: Range<usize>,
    values: Range<usize>,
}

impl Prefix {
    /// Those of layer `index`, if `prompt` is of keys and values, `width` columns each.
    pub(crate) fn new(prompt: &Prompt, index: usize, width: usize) -> Option<Self> {
        let at = |half: usize| {
            let first = (2 * index + half) * width;
            first..first + width
        };
        (prompt.of == PromptOf::KeysAndValues).then(|| Self {
            rows: prompt.rows,
            tokens: prompt.tokens,
            keys: at(0),
            values: at(1),
        })
    }
}

impl Layer {
    /// Overlays the keys of a prefix on those of `qk`, the queries and keys with their positions.
    pub(crate) fn place_keys(&self, run: &Run<'_>, qk: &mut Tensor) -> Result<()> {
        let Some(prefix) = &self.prefix else {
            return Ok(());
        };
        let [_, keys, _] = self.columns();
        place(run, prefix.rows, &prefix.keys, qk, keys)
    }

    /// Overlays the values of a prefix on those of the projection.
    pub(crate) fn place_values(&self, run: &Run<'_>, qkv: &mut Tensor) -> Result<()> {
        let Some(prefix) = &self.prefix else {
            return Ok(());
        };
        let [_, _, values] = self.columns();
        place(run, prefix.rows, &prefix.values, qkv, values)
    }

    /// Takes the gradients of keys and values of a prefix out of `d_qkv`.
    pub(crate) fn prefix_backward(
        &self,
        run: &Run<'_>,
        grads: &mut FlatBuffer,
        d_qkv: &mut Tensor,
    ) -> Result<()> {
        let Some(prefix) = &self.prefix else {
            return Ok(());
        };
        let (ids, workspace) = (&run.inputs.prompt_rows, run.workspace);
        let [_, keys, values] = self.columns();
        for (columns, of) in [(keys, &prefix.keys), (values, &prefix.values)] {
            let mut rows = workspace.take_zeroed(DType::F32, prefix.tokens, of.len());
            let none = workspace.take_zeroed(run.dtype, prefix.tokens, of.len());
            let d = d_qkv.view().columns(columns.clone());
            embedding::overlay_backward(d, FIRST, ids, rows.view_mut())?;
            let to = grads.view_mut(prefix.rows).columns(of.clone());
            axpby::add(1.0, to, 1.0, rows.view())?;
            let d = d_qkv.view_mut().columns(columns);
            embedding::overlay(none.view(), FIRST, ids, d)?;
            run.give([rows, none]);
        }
        Ok(())
    }
}

fn place(
    run: &Run<'_>,
    rows: ParamId,
    of: &Range<usize>,
    to: &mut Tensor,
    columns: Range<usize>,
) -> Result<()> {
    let rows = run.params.view_as(rows, run.dtype).columns(of.clone());
    let to = to.view_mut().columns(columns);
    Ok(embedding::overlay(
        rows,
        FIRST,
        &run.inputs.prompt_rows,
        to,
    )?)
}

/// The rows of `hidden` that are tokens of `batch`, which has `tokens` virtual ones before each document in
/// `hidden`.
pub(crate) fn without_prompt(
    hidden: Tensor,
    batch: &PackedBatch,
    tokens: usize,
    workspace: &Workspace,
) -> Result<Tensor> {
    let mut kept: Vec<u32> = Vec::with_capacity(batch.rows());
    for (s, bounds) in batch.cu_seqlens.windows(2).enumerate() {
        let shift = ((s + 1) * tokens) as u32;
        kept.extend((bounds[0]..bounds[1]).map(|row| row + shift));
    }
    let shift = (batch.sequences() * tokens) as u32;
    kept.extend((batch.tokens() as u32..batch.rows() as u32).map(|row| row + shift));
    let [kept] = workspace.indices([kept.into()]);
    let mut rows = workspace.take(hidden.dtype(), batch.rows(), hidden.cols());
    embedding::forward(hidden.view(), &kept, rows.view_mut())?;
    workspace.give(hidden);
    Ok(rows)
}
