//! LoRA and rsLoRA on linear layers.
//!
//! `y = x W^T + scale * dropout(x) A^T B^T` with A `[rank, in_features]`, B
//! `[out_features, rank]`, W frozen; scale = alpha / rank, or alpha / √rank for rsLoRA.
//!
//! # Source
//! Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models" (2021); Kalajdzievski: "A Rank
//! Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023); file format: PEFT.

mod config;
mod files;
mod init;
pub(crate) mod names;
#[cfg(test)]
mod tests;

pub use config::{InitLoraWeights, LoraConfig};
pub(crate) use files::{CONFIG_FILE, Factors, read_factors};

use crate::target::{self, TargetModules};
use ferrotune_core::adapter::{Adapter, Attachment, LowRank, Site, SiteId, SiteKind};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use names::Factor;
use std::path::Path;

/// LoRA over a whole model.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    config: LoraConfig,
}

impl LoraAdapter {
    /// An adapter for a base of `model_type` (as in its `config.json`), which decides the targets
    /// where `config` leaves them out.
    ///
    /// # Errors
    /// [`Error::Config`] if a value is out of range, or no targets are given for a model type that
    /// has no default.
    pub fn new(config: LoraConfig, model_type: &str) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config: config.with_default_targets(model_type)?,
        })
    }

    /// What it was made from, with the targets filled in.
    #[must_use]
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Opens a saved adapter again and compares it with `params`, bit for bit.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming the first tensor or configuration key that differs.
    pub fn verify_saved(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        let mut read = FlatBuffer::zeros(params.layout());
        self.load(&mut read, directory)?;
        for (id, segment) in params.layout().by_name() {
            let name = &segment.spec.name;
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
            if Factor::of(name).is_some() && !params.get(id).iter().zip(read.get(id)).all(same) {
                return Err(Error::adapter(
                    directory,
                    format!("`{name}` reads back with other values than were written"),
                ));
            }
        }
        Ok(())
    }
}

impl Adapter for LoraAdapter {
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let config = &self.config;
        let selection = config.selection()?;
        let targets = target::resolve(sites, &selection, &config.rank_and_alpha())?;
        if *selection.target_modules == TargetModules::AllLinear {
            files::require_expressible(sites, &targets)?;
        }
        targets
            .iter()
            .map(|target| {
                require_linear(target.site)?;
                let low_rank = declare(config, target, params);
                Ok((target.site.id, Attachment::LowRank(low_rank)))
            })
            .collect()
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        init::fill(params, self.config.init_lora_weights, seed)
    }

    /// Also opens the files again and compares them: see [`LoraAdapter::verify_saved`].
    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        files::save(&self.config, params, directory)?;
        self.verify_saved(params, directory)
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        files::load(&self.config, params, directory)
    }

    fn describe(&self) -> String {
        let LoraConfig {
            rank,
            alpha,
            dropout,
            use_rslora,
            ..
        } = &self.config;
        let method = if *use_rslora { "rsLoRA" } else { "LoRA" };
        let patterns =
            if self.config.rank_pattern.is_empty() && self.config.alpha_pattern.is_empty() {
                ""
            } else {
                " with patterns"
            };
        if *dropout == 0.0 {
            format!("{method} r={rank} alpha={alpha}{patterns}")
        } else {
            format!("{method} r={rank} alpha={alpha} dropout={dropout}{patterns}")
        }
    }
}

/// Declares A and B of one target.
fn declare(
    config: &LoraConfig,
    target: &target::Target<'_>,
    params: &mut ParamLayoutBuilder,
) -> LowRank {
    let (site, rank) = (target.site, target.rank);
    let mut add = |factor, shape: [usize; 2]| {
        let name = names::tensor(&site.name, factor);
        params.add(ParamSpec::new(name, shape, site.execution_order))
    };
    LowRank {
        a: add(Factor::A, [rank, site.in_features]),
        b: add(Factor::B, [site.out_features, rank]),
        rank,
        scale: config.scale(rank, target.alpha),
        dropout: config.dropout as f32,
        magnitude: None,
    }
}

fn require_linear(site: &Site) -> Result<()> {
    let kind = match site.kind {
        SiteKind::Linear => return Ok(()),
        SiteKind::Embedding => "an embedding: LoRA on embeddings is not supported yet",
        SiteKind::Norm => "a norm: LoRA needs a linear layer",
    };
    Err(Error::config(
        "target_modules",
        format!(
            "`{}` is {kind}; leave it out, or put it into `exclude_modules`",
            site.name
        ),
    ))
}
