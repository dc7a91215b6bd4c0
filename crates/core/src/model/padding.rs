//! Padding that is computed as Transformers computes it, with PyTorch's own attention (`sdpa`).
//!
//! There a row of padding is a query like any other: behind a document it sees the keys of that document that its
//! window reaches, and not its own, which is masked; where it sees none, its attention is 0. No output of a document
//! depends on that, but for `LLM.int8()`, where a large value in any row keeps a column of all rows in floating point.

use crate::data::PackedBatch;
use ferrotune_kernels::{Device, Indices, Result, View, ViewMut, attention};
use std::ops::Range;

/// The rows of padding of a batch that has [`PackedBatch::padding_of`].
#[derive(Debug)]
pub(crate) struct Padding {
    /// Those that see keys.
    rows: Vec<PaddingRow>,
    /// Bounds of all rows that are computed.
    pub(crate) computed: Indices<'static>,
}

#[derive(Debug)]
struct PaddingRow {
    row: usize,
    /// The document's rows.
    document: Range<usize>,
    /// Its place after the start of the document.
    place: usize,
}

impl Padding {
    /// That of `batch`, if any of it is to be computed.
    pub(crate) fn of(batch: &PackedBatch, device: &Device) -> Option<Self> {
        if batch.padding_of.is_empty() {
            return None;
        }
        let first = batch.tokens();
        let mut before = vec![0; batch.sequences()];
        let mut rows = Vec::new();
        for (row, document) in (first..).zip(&batch.padding_of) {
            let Some(document) = document.map(|document| document as usize) else {
                continue;
            };
            let bounds = &batch.cu_seqlens[document..document + 2];
            let keys = bounds[0] as usize..bounds[1] as usize;
            rows.push(PaddingRow {
                row,
                place: keys.len() + before[document],
                document: keys,
            });
            before[document] += 1;
        }
        let end = (first + batch.padding_of.len()) as u32;
        let computed = Indices::new(vec![0, end], device);
        Some(Self { rows, computed })
    }

    /// Attention of its rows: `q`, `k` and `v`, and what [`attention::forward`] writes of documents.
    pub(crate) fn attend(
        &self,
        config: &attention::Config,
        [q, k, v]: [View<'_>; 3],
        mut out: ViewMut<'_>,
        mut lse: ViewMut<'_>,
        device: &Device,
    ) -> Result<()> {
        let query_bounds = Indices::new(vec![0, 1], device);
        for padding in &self.rows {
            let query = padding.row..padding.row + 1;
            // A window counts the place of the query itself, which is masked.
            let hidden = config
                .window
                .map_or(0, |w| (padding.place + 1).saturating_sub(w));
            let keys = padding.document.start + hidden..padding.document.end;
            if keys.is_empty() {
                continue;
            }
            let key_bounds = Indices::new(vec![0, keys.len() as u32], device);
            attention::forward(
                config,
                q.row_range(query.clone()),
                k.row_range(keys.clone()),
                v.row_range(keys),
                &query_bounds,
                &key_bounds,
                out.reborrow().row_range(query.clone()),
                lse.reborrow().row_range(query),
            )?;
        }
        Ok(())
    }
}
