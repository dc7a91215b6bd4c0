//! Padded batches as other software runs them, turned into our packed ones.

use ferrotune_core::data::{IGNORE_INDEX, PackedBatch};

/// The arguments of one forward call, each `[rows, cols]`.
#[derive(Debug)]
pub(super) struct PaddedBatch {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) input_ids: Vec<i64>,
    pub(super) labels: Option<Vec<i64>>,
    /// The class of each row, `[rows]`, where that is what is learned.
    pub(super) classes: Option<Vec<i64>>,
    pub(super) attention_mask: Option<Vec<i64>>,
    pub(super) position_ids: Option<Vec<i64>>,
}

impl PaddedBatch {
    /// The packed batch, and for each of its tokens the place it had in `[rows, cols]`.
    ///
    /// A row without position ids counts 0..cols, left-padded rows too. With position ids and no
    /// mask, a new document starts wherever they restart at 0.
    pub(super) fn pack(&self) -> (PackedBatch, Vec<usize>) {
        let mut batch = PackedBatch {
            cu_seqlens: vec![0],
            ..PackedBatch::default()
        };
        let mut places = Vec::new();
        for row in 0..self.rows {
            let first = places.len();
            for col in 0..self.cols {
                let at = row * self.cols + col;
                if self.attention_mask.as_ref().is_some_and(|m| m[at] == 0) {
                    continue;
                }
                let position = self.position_ids.as_ref().map_or(col as i64, |p| p[at]);
                if self.position_ids.is_some() && position == 0 && places.len() > first {
                    self.close(&mut batch);
                }
                batch.input_ids.push(self.input_ids[at] as u32);
                batch
                    .labels
                    .push(self.labels.as_ref().map_or(IGNORE_INDEX, |l| l[at] as i32));
                batch.position_ids.push(position as u32);
                places.push(at);
            }
            self.close(&mut batch);
            if let (Some(classes), Some(label)) = (&self.classes, batch.labels.last_mut()) {
                *label = classes[row] as i32;
            }
        }
        (batch, places)
    }

    /// [`Self::pack`] with all padding, computed as Transformers computes it.
    pub(super) fn pack_with_padding(&self) -> (PackedBatch, Vec<usize>) {
        let (mut batch, places) = self.pack();
        // The row of each document, and the place after its end.
        let documents = batch.cu_seqlens.windows(2).map(|document| {
            let last = places[document[1] as usize - 1];
            (last / self.cols, last + 1)
        });
        let documents: Vec<(usize, usize)> = documents.collect();
        for at in (0..self.rows * self.cols).filter(|at| places.binary_search(at).is_err()) {
            let before = |&(row, end): &(usize, usize)| row == at / self.cols && end <= at;
            let position = self
                .position_ids
                .as_ref()
                .map_or((at % self.cols) as i64, |p| p[at]);
            batch.input_ids.push(self.input_ids[at] as u32);
            batch.labels.push(IGNORE_INDEX);
            batch.position_ids.push(position as u32);
            let document = documents.iter().rposition(before);
            batch
                .padding_of
                .push(document.map(|document| document as u32));
        }
        (batch, places)
    }

    /// Ends the document that is being filled, if it has tokens.
    fn close(&self, batch: &mut PackedBatch) {
        let end = batch.input_ids.len() as u32;
        if batch.cu_seqlens.last() != Some(&end) {
            batch.cu_seqlens.push(end);
            batch.sequence_ids.push(batch.sequence_ids.len() as u64);
            // Transformers scales dynamic RoPE by the longest position of the whole call.
            let longest = match &self.position_ids {
                Some(positions) => positions.iter().max().map_or(0, |p| *p as u32 + 1),
                None => self.cols as u32,
            };
            batch.rope_lengths.push(longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_dropped_and_positions_stay() {
        let padded = PaddedBatch {
            rows: 2,
            cols: 3,
            input_ids: vec![0, 7, 8, 4, 5, 6],
            labels: Some(vec![-100, -100, 8, 4, 5, 6]),
            classes: None,
            attention_mask: Some(vec![0, 1, 1, 1, 1, 1]),
            position_ids: None,
        };
        let (batch, places) = padded.pack();
        assert_eq!(batch.input_ids, [7, 8, 4, 5, 6]);
        assert_eq!(batch.position_ids, [1, 2, 0, 1, 2]);
        assert_eq!(batch.cu_seqlens, [0, 2, 5]);
        assert_eq!(places, [1, 2, 3, 4, 5]);
        assert_eq!(batch.targets().1, [8, 5, 6]);
    }

    #[test]
    fn padding_that_is_computed_comes_behind_all_documents() {
        let padded = PaddedBatch {
            rows: 3,
            cols: 4,
            input_ids: vec![5, 6, 0, 0, 0, 7, 8, 9, 0, 0, 0, 0],
            labels: None,
            classes: None,
            attention_mask: Some(vec![1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
            position_ids: None,
        };
        let (batch, places) = padded.pack_with_padding();
        assert_eq!(batch.input_ids, [5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(batch.position_ids, [0, 1, 1, 2, 3, 2, 3, 0, 0, 1, 2, 3]);
        assert_eq!((batch.tokens(), batch.rows()), (5, 12));
        // Before a document, and where there is none, padding sees nothing.
        let none = None;
        assert_eq!(
            batch.padding_of,
            [Some(0), Some(0), none, none, none, none, none]
        );
        assert_eq!(places, [0, 1, 5, 6, 7]);
    }

    #[test]
    fn documents_start_where_positions_restart() {
        let padded = PaddedBatch {
            rows: 1,
            cols: 4,
            input_ids: vec![1, 2, 3, 4],
            labels: None,
            classes: None,
            attention_mask: None,
            position_ids: Some(vec![0, 1, 0, 1]),
        };
        assert_eq!(padded.pack().0.cu_seqlens, [0, 2, 4]);
    }
}
