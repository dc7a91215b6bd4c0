//! One micro-batch: documents packed into a single row.

/// A label that is not trained on, as everywhere in the Hugging Face ecosystem.
pub const IGNORE_INDEX: i32 = -100;

/// One tokenised document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// For each token itself (not shifted): its id if it is to be predicted, else [`IGNORE_INDEX`].
    /// The first token of a document is never predicted, whatever its label.
    pub labels: Vec<i32>,
}

impl Example {
    /// Number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// Whether there are no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// Number of tokens that are predicted.
    #[must_use]
    pub fn trained_tokens(&self) -> usize {
        Self::trained_labels(&self.labels)
    }

    /// Of the labels of a document, those that are predicted.
    pub(crate) fn trained_labels(labels: &[i32]) -> usize {
        let predicted = labels.iter().skip(1);
        predicted.filter(|&&l| l != IGNORE_INDEX).count()
    }
}

/// Documents packed into one row of T tokens. Attention never crosses a document.
///
/// Tokens after the last document are padding ([`PackedBatch::padded_to`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedBatch {
    /// Token ids, `[T]`.
    pub input_ids: Vec<u32>,
    /// Labels, not shifted, `[T]`.
    pub labels: Vec<i32>,
    /// Position of each token in its document, `[T]`.
    pub position_ids: Vec<u32>,
    /// Document s is rows `cu_seqlens[s]..cu_seqlens[s + 1]`, `[S + 1]`; `[0]` when empty.
    pub cu_seqlens: Vec<u32>,
    /// Identity of each document in its optimizer step, `[S]`: the key of random draws, so that
    /// they do not depend on how documents are split into micro-batches.
    pub sequence_ids: Vec<u64>,
    /// Length by which dynamic RoPE scales each document, `[S]`: its own length, unless a caller
    /// reproduces a padded batch.
    pub rope_lengths: Vec<u32>,
    /// For each row after the last document that is computed although it is padding, the document that it follows, if
    /// any: it is a query that sees the keys of that document. Nothing depends on such rows but which columns
    /// `LLM.int8()` leaves in floating point. Empty but to reproduce a padded batch.
    pub padding_of: Vec<Option<u32>>,
}

impl PackedBatch {
    /// Packs documents in the given order; the id of each is its place in the optimizer step.
    #[must_use]
    pub fn pack<'a>(documents: impl IntoIterator<Item = (u64, &'a Example)>) -> Self {
        let mut batch = Self {
            cu_seqlens: vec![0],
            ..Self::default()
        };
        for (id, document) in documents {
            batch.input_ids.extend_from_slice(&document.input_ids);
            batch.labels.extend_from_slice(&document.labels);
            batch.position_ids.extend(0..document.len() as u32);
            batch.cu_seqlens.push(batch.input_ids.len() as u32);
            batch.sequence_ids.push(id);
            batch.rope_lengths.push(document.len() as u32);
        }
        batch
    }

    /// The documents of all `batches`, which have no padding, in one.
    #[must_use]
    pub fn joined<'a>(batches: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut joined = Self::pack([]);
        for batch in batches {
            let first = joined.rows() as u32;
            joined.input_ids.extend_from_slice(&batch.input_ids);
            joined.labels.extend_from_slice(&batch.labels);
            joined.position_ids.extend_from_slice(&batch.position_ids);
            let ends = batch.cu_seqlens.iter().skip(1);
            joined.cu_seqlens.extend(ends.map(|end| first + end));
            joined.sequence_ids.extend_from_slice(&batch.sequence_ids);
            joined.rope_lengths.extend_from_slice(&batch.rope_lengths);
        }
        joined
    }

    /// The same documents with padding up to `rows` rows, if there are fewer: tokens of no document,
    /// which are not trained on.
    #[must_use]
    pub fn padded_to(mut self, rows: usize) -> Self {
        let rows = rows.max(self.rows());
        // A token that occurs: its embedding is as finite as the others.
        let token = self.input_ids.first().copied().unwrap_or(0);
        self.input_ids.resize(rows, token);
        self.labels.resize(rows, IGNORE_INDEX);
        self.position_ids.resize(rows, 0);
        self
    }

    /// Tokens of documents.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.cu_seqlens.last().map_or(0, |end| *end as usize)
    }

    /// T, the number of tokens with padding.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.input_ids.len()
    }

    /// Rows of padding that are computed, and the length by which dynamic RoPE scales each.
    pub(crate) fn computed_padding(&self) -> impl Iterator<Item = (usize, u32)> {
        let longest = self.rope_lengths.iter().copied().max().unwrap_or_default();
        let length = move |document: &Option<u32>| {
            let own = document.and_then(|document| self.rope_lengths.get(document as usize));
            own.copied().unwrap_or(longest)
        };
        (self.tokens()..).zip(self.padding_of.iter().map(length))
    }

    /// The same with the labels of a classifier of sequences: of the first `count` documents, class 0.
    #[must_use]
    pub(crate) fn with_classes(mut self, count: usize) -> Self {
        self.labels.fill(IGNORE_INDEX);
        let ends = self
            .cu_seqlens
            .windows(2)
            .filter(|d| d[0] < d[1])
            .take(count);
        for document in ends {
            self.labels[document[1] as usize - 1] = 0;
        }
        self
    }

    /// Documents whose first token has a label, which nothing before it predicts.
    #[must_use]
    pub fn trained_first_tokens(&self) -> usize {
        let documents = self.cu_seqlens.windows(2).filter(|d| d[0] < d[1]);
        documents
            .filter(|d| self.labels[d[0] as usize] != IGNORE_INDEX)
            .count()
    }

    /// S, the number of documents.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.sequence_ids.len()
    }

    /// The rows whose next token is trained on, and that token: `(rows, targets)`, both `[N]`.
    ///
    /// Row t predicts the label of t + 1 within its document.
    #[must_use]
    pub fn targets(&self) -> (Vec<u32>, Vec<u32>) {
        self.trained().unzip()
    }

    /// Number of tokens that are trained on.
    #[must_use]
    pub fn trained_tokens(&self) -> usize {
        self.trained().count()
    }

    fn trained(&self) -> impl Iterator<Item = (u32, u32)> {
        let documents = self.cu_seqlens.windows(2);
        let rows =
            documents.flat_map(|bounds| bounds[0]..bounds[1].saturating_sub(1).max(bounds[0]));
        rows.filter_map(|row| {
            let label = self.labels[row as usize + 1];
            (label != IGNORE_INDEX).then_some((row, label as u32))
        })
    }
}

/// Sizes of a micro-batch, without padding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchSize {
    /// Tokens.
    pub tokens: usize,
    /// Tokens that are trained on; fewer than `tokens`.
    pub label_rows: usize,
    /// Documents.
    pub documents: usize,
}

impl BatchSize {
    /// A micro-batch of these sizes, or near them where there is none: token 0 all over, in documents of
    /// about one length.
    #[must_use]
    pub fn invented(self) -> PackedBatch {
        let documents = self.documents.clamp(1, self.tokens.max(1));
        let mut labels = self.label_rows;
        let lengths = (0..documents).map(|d| {
            let end = |d: usize| self.tokens * d / documents;
            end(d + 1) - end(d)
        });
        let examples: Vec<Example> = lengths
            .map(|length| {
                let trained = labels.min(length.saturating_sub(1));
                labels -= trained;
                let label = |at: usize| if at <= trained { 0 } else { IGNORE_INDEX };
                Example {
                    input_ids: vec![0; length],
                    labels: (0..length).map(label).collect(),
                }
            })
            .collect();
        PackedBatch::pack(examples.iter().enumerate().map(|(i, e)| (i as u64, e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invented_batches_have_the_sizes_asked_for() {
        for (tokens, label_rows, documents) in [(10, 4, 3), (7, 6, 1), (1, 0, 1), (64, 48, 16)] {
            let size = BatchSize {
                tokens,
                label_rows,
                documents,
            };
            let batch = size.invented();
            let sizes = (batch.tokens(), batch.trained_tokens(), batch.sequences());
            assert_eq!(sizes, (tokens, label_rows, documents));
        }
    }

    #[test]
    fn targets_never_cross_a_document_nor_reach_into_padding() {
        let a = Example {
            input_ids: vec![1, 2, 3],
            labels: vec![1, IGNORE_INDEX, 3],
        };
        let b = Example {
            input_ids: vec![4, 5],
            labels: vec![4, 5],
        };
        let batch = PackedBatch::pack([(0, &a), (1, &b)]);
        assert_eq!(batch.cu_seqlens, [0, 3, 5]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 1]);
        assert_eq!(batch.targets(), (vec![1, 3], vec![3, 5]));
        assert_eq!(a.trained_tokens() + b.trained_tokens(), 2);
        assert_eq!(PackedBatch::pack([]).targets(), (vec![], vec![]));
        let padded = batch.clone().padded_to(9);
        assert_eq!((padded.tokens(), padded.rows()), (5, 9));
        assert_eq!(padded.targets(), batch.targets());
    }
}
