//! LoRA+: B learns faster than A.
//!
//! # Source
//! Hayou et al.: "LoRA+: Efficient Low Rank Adaptation of Large Models" (2024); which tensors belong to
//! which group: `create_loraplus_optimizer` of PEFT 0.21.

use ferrotune_core::Result;
use ferrotune_core::adapter::{Adapter, Attachment, BaseWeights, Site, SiteId, StepDone};
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use std::path::Path;

/// Another method, with its own learning rate for B.
#[derive(Debug)]
pub struct LoraPlus {
    method: Box<dyn Adapter>,
    lr_ratio: f64,
    embedding_ratio: f64,
}

impl LoraPlus {
    /// `method` with `lr_ratio` times the learning rate on every B and every vector, and
    /// `embedding_ratio` times on both factors of an embedding.
    #[must_use]
    pub fn new(method: Box<dyn Adapter>, lr_ratio: f64, embedding_ratio: f64) -> Self {
        Self {
            method,
            lr_ratio,
            embedding_ratio,
        }
    }
}

impl Adapter for LoraPlus {
    fn decoder(&self, base: DecoderConfig) -> Result<DecoderConfig> {
        self.method.decoder(base)
    }

    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let attachments = self.method.attach(sites, params)?;
        for spec in params.specs_mut() {
            if spec.name.contains("lora_embedding") {
                spec.lr_scale *= self.embedding_ratio;
            } else if spec.name.contains("lora_B") || spec.shape.len() == 1 {
                spec.lr_scale *= self.lr_ratio;
            }
        }
        Ok(attachments)
    }

    fn prepare(&self, params: &mut FlatBuffer, base: &mut dyn BaseWeights) -> Result<()> {
        self.method.prepare(params, base)
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        self.method.init(params, seed)
    }

    fn plan_steps(&mut self, total_steps: u64) -> Result<()> {
        self.method.plan_steps(total_steps)
    }

    fn state(&self) -> &'static [&'static str] {
        self.method.state()
    }

    fn complete_gradients(
        &self,
        params: &FlatBuffer,
        weight: f32,
        grads: &mut FlatBuffer,
    ) -> Result<f64> {
        self.method.complete_gradients(params, weight, grads)
    }

    fn preconditions(&self) -> bool {
        self.method.preconditions()
    }

    fn precondition(&self, params: &FlatBuffer, grads: &mut FlatBuffer) -> Result<()> {
        self.method.precondition(params, grads)
    }

    fn after_step(&self, params: &mut FlatBuffer, done: StepDone<'_>) -> Result<()> {
        self.method.after_step(params, done)
    }

    fn finish(&self, params: &mut FlatBuffer) {
        self.method.finish(params);
    }

    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        self.method.save(params, directory)
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        self.method.load(params, directory)
    }

    fn describe(&self) -> String {
        format!("{} lr_ratio={}", self.method.describe(), self.lr_ratio)
    }
}
