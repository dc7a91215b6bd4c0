//! Activated LoRA: the updates of linears act from the last occurrence of some tokens in a document on, and what comes
//! before it is computed as the base computes it.
//!
//! # Source
//! Greenewald et al.: "Activated LoRA: Fine-tuned LLMs for Intrinsics" (2025); PEFT's `calculate_alora_offsets`.

use crate::adapter::{Attachment, SiteId};
use crate::data::PackedBatch;
use ferrotune_kernels::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The tokens that call the updates up.
#[derive(Debug)]
pub(crate) struct Invocation {
    tokens: Vec<u32>,
    /// `[1, R]` of the highest rank: what an update gets where it does not act.
    pub(crate) zeros: Arc<Tensor>,
}

impl Invocation {
    /// `tokens` before what `attachments` update.
    pub(crate) fn new(
        tokens: Vec<u32>,
        attachments: &BTreeMap<SiteId, Attachment>,
        device: &Device,
    ) -> Self {
        let rank = |attachment: &Attachment| match attachment {
            Attachment::LowRank(update) => update.rank,
            _ => 0,
        };
        let rank = attachments.values().map(rank).max().unwrap_or(0);
        let zeros = Arc::new(Tensor::zeros(DType::F32, 1, rank).to_device(device));
        Self { tokens, zeros }
    }

    /// Where the updates of a document begin to act, if they do.
    fn start(&self, document: &[u32]) -> Option<usize> {
        let mut places = document.windows(self.tokens.len().max(1));
        places.rposition(|window| window == self.tokens)
    }

    /// Whether the updates act anywhere in a document.
    pub(crate) fn is_in(&self, document: &[u32]) -> bool {
        self.start(document).is_some()
    }

    /// For each row of `batch` 1 if the updates do not act there, else 0. `goes_on` says of a document whose beginning
    /// was seen before whether they act in it.
    pub(crate) fn silent(
        &self,
        batch: &PackedBatch,
        goes_on: impl Fn(usize) -> Option<bool>,
    ) -> Vec<u32> {
        let mut silent = vec![1; batch.rows()];
        for (s, bounds) in batch.cu_seqlens.windows(2).enumerate() {
            let document = bounds[0] as usize..bounds[1] as usize;
            let start = match goes_on(s) {
                Some(acts) => acts.then_some(0),
                None => self.start(&batch.input_ids[document.clone()]),
            };
            if let Some(start) = start {
                silent[document][start..].fill(0);
            }
        }
        silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_act_from_the_last_occurrence_on() {
        let invocation = Invocation::new(vec![7, 8], &BTreeMap::new(), &Device::Cpu);
        let batch = PackedBatch {
            input_ids: vec![7, 8, 1, 7, 8, 2, 7, 3, 7, 8],
            cu_seqlens: vec![0, 6, 8, 10],
            ..PackedBatch::default()
        };
        let silent = |goes_on: fn(usize) -> Option<bool>| invocation.silent(&batch, goes_on);
        assert_eq!(silent(|_| None), [1, 1, 1, 0, 0, 0, 1, 1, 0, 0]);
        let goes_on = |s| [Some(true), None, Some(false)][s];
        assert_eq!(silent(goes_on), [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]);
        assert!(invocation.is_in(&[1, 7, 8]) && !invocation.is_in(&[7]));
    }
}
