//! LoRA+: B learns faster than A.
//!
//! # Source
//! Hayou et al.: "LoRA+: Efficient Low Rank Adaptation of Large Models" (2024); which tensors belong to
//! which group: `create_loraplus_optimizer` of PEFT 0.21.

use crate::over::{Above, Over};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Adapter, Attachment, SiteId};
use ferrotune_core::params::ParamLayoutBuilder;

/// Another method, with its own learning rate for B.
pub type LoraPlus = Over<Ratios>;

/// Factors of the learning rate.
#[derive(Debug)]
pub struct Ratios {
    lr: f64,
    embedding: f64,
}

impl LoraPlus {
    /// `method` with `lr_ratio` times the learning rate on every B and every vector, and
    /// `embedding_ratio` times on both factors of an embedding.
    #[must_use]
    pub fn new(method: Box<dyn Adapter>, lr_ratio: f64, embedding_ratio: f64) -> Self {
        let (lr, embedding) = (lr_ratio, embedding_ratio);
        Self::of(method, Ratios { lr, embedding })
    }
}

impl Above for Ratios {
    fn attached(&self, _: &[(SiteId, Attachment)], params: &mut ParamLayoutBuilder) -> Result<()> {
        for spec in params.specs_mut() {
            if spec.name.contains("lora_embedding") {
                spec.lr_scale *= self.embedding;
            } else if spec.name.contains("lora_B") || spec.shape.len() == 1 {
                spec.lr_scale *= self.lr;
            }
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("lr_ratio={}", self.lr)
    }
}
