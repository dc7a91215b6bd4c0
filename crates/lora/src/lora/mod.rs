//! LoRA and rsLoRA on linear layers and embeddings, and what PEFT trains of the base beside them.
//!
//! `y = x W^T + scale * (dropout(x) A^T B^T + b)` with A `[rank, in_features]`, B
//! `[out_features, rank]`, W frozen; scale = alpha / rank, or alpha / √rank for rsLoRA; b with
//! `lora_bias` alone. Of the base itself, `bias` trains biases, `modules_to_save` whole modules and
//! `trainable_token_indices` rows of a table.
//!
//! # Source
//! Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models" (2021); Kalajdzievski: "A Rank
//! Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023); file format: PEFT.

mod attach;
mod config;
mod convert;
mod dora;
mod files;
pub(crate) mod init;
#[cfg(test)]
mod tests;
pub(crate) mod tokens;

pub use config::{LoraBias, LoraConfig};
pub(crate) use files::{read_tensors, write_tensors};
pub use init::{
    CordaMethod, Direction, EvaConfig, InitLoraWeights, LoftqConfig, LoraGaConfig, Observation,
    Scale, Start,
};
pub use tokens::TokenIndices;

use crate::names::Part;
use crate::target::last_segment;
use ferrotune_core::adapter::{Adapter, Attachment, BaseWeights, Site, SiteId};
use ferrotune_core::model::{DecoderConfig, ModelPlan};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_core::{Error, Result};
use std::path::Path;
use std::sync::OnceLock;

/// Refuses layers that PEFT does not find: it could not read the adapter.
fn require_layers(path: &str) -> Result<()> {
    if last_segment(path) == "layers" {
        return Ok(());
    }
    let message = format!(
        "is for models whose layers PEFT finds, in a module `layers`, and this base has them in `{path}`; leave it out"
    );
    Err(Error::config("layer_replication", message))
}

/// LoRA over a whole model.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    config: LoraConfig,
    /// Known from the moment on when the base is changed by it, or a file with it was read.
    start: OnceLock<Start>,
    /// Whether an update of a changed base is written as one of the base itself.
    converts: bool,
    /// Whether it is one that PEFT may have written, which reads what a run should not ask for.
    of_file: bool,
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
        Self::build(config, model_type, false)
    }

    /// The same, as a file has it: what decides nothing is a warning, and what training alone could not use is legal.
    pub(crate) fn of_file(config: LoraConfig, model_type: &str) -> Result<Self> {
        config.validate_as_file()?;
        Self::build(config, model_type, true)
    }

    fn build(config: LoraConfig, model_type: &str, of_file: bool) -> Result<Self> {
        let mut config = config.with_default_targets(model_type)?;
        config.trainable_token_indices = config.trainable_token_indices.map(TokenIndices::distinct);
        Ok(Self {
            config,
            start: OnceLock::new(),
            converts: true,
            of_file,
        })
    }

    /// The same, starting from `start` instead of what it would compute.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub fn starting_from(mut self, start: Start) -> Result<Self> {
        if let InitLoraWeights::Eva(eva) = self.config.init_lora_weights {
            self.config = init::eva::with_ranks_of(&self.config, eva, &start)?;
        }
        self.start = OnceLock::from(start);
        Ok(self)
    }

    /// What it has to see of data before it can start, on a model of `plan`; `None` if nothing.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern matches nothing.
    pub fn observation(&self, plan: &ModelPlan) -> Result<Option<Observation>> {
        Observation::new(&self.config, plan)
    }

    /// The same, which writes an update of the base that its start left, with that start in
    /// `initial_adapter/` beside it, instead of a plain LoRA of twice the rank for the untouched base.
    #[must_use]
    pub fn without_conversion(mut self) -> Self {
        self.converts = false;
        self
    }

    /// What the run that saved `directory` started from, as far as the files say: an adapter that was not
    /// converted may come without it, and follows from the base again.
    ///
    /// # Errors
    /// [`Error::Adapter`] if a file is damaged or belongs to another adapter.
    pub fn start_of(&self, directory: &Path) -> Result<Option<Start>> {
        files::start(&self.config, directory)
    }

    /// What it was made from, with the targets filled in.
    #[must_use]
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The plain LoRA of the untouched base that the adapter in `directory` is, with its tensors.
    pub(crate) fn plain(
        self,
        directory: &Path,
        params: &mut FlatBuffer,
        base: &mut dyn BaseWeights,
    ) -> Result<(Self, FlatBuffer)> {
        let start = init::prepare(&self.config, self.start.get().cloned(), params, base)?;
        self.load(params, directory)?;
        let start = start.ok_or_else(|| {
            Error::adapter(directory, "has no start that could be taken out of it")
        })?;
        let plain = convert::join(params, &start)?;
        let config = convert::config(&self.config);
        let adapter = Self {
            config,
            start: OnceLock::new(),
            converts: true,
            of_file: false,
        };
        Ok((adapter, plain))
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
            if Part::of(name).is_some() && !params.get(id).iter().zip(read.get(id)).all(same) {
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
    fn decoder(&self, base: DecoderConfig) -> Result<DecoderConfig> {
        match self.config.layer_replication.as_slice() {
            [] => Ok(base),
            ranges => {
                require_layers(base.modules.layers)?;
                base.stacked(ranges)
            }
        }
    }

    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        attach::attach(&self.config, self.of_file, sites, params)
    }

    fn prepare(&self, params: &mut FlatBuffer, base: &mut dyn BaseWeights) -> Result<()> {
        let start = init::prepare(&self.config, self.start.get().cloned(), params, base)?;
        if let Some(start) = start {
            let _ = self.start.set(start);
        }
        if self.config.use_dora {
            dora::start(&self.config, params, base)?;
        }
        Ok(())
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        init::fill(params, self.config.init_lora_weights, seed)
    }

    /// Also opens the files again and compares them: see [`LoraAdapter::verify_saved`].
    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        params.read_back()?;
        let subtracted = self.config.init_lora_weights.subtracts();
        match self.start.get().filter(|_| subtracted) {
            Some(start) if self.converts => {
                let plain = convert::join(params, start)?;
                files::save(&convert::config(&self.config), &plain, directory)?;
            }
            Some(start) => {
                files::save_start(&self.config, start, directory)?;
                files::save(&self.config, params, directory)?;
            }
            None => files::save(&self.config, params, directory)?,
        }
        self.verify_saved(params, directory)
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        let Some(start) = files::load(&self.config, params, directory)? else {
            return Ok(());
        };
        if self.start.get_or_init(|| start.clone()).same(&start) {
            return Ok(());
        }
        let message =
            "started from other values than this model, whose base is another one for that";
        Err(Error::adapter(directory, message))
    }

    fn describe(&self) -> String {
        let LoraConfig {
            rank,
            alpha,
            dropout,
            use_rslora,
            ..
        } = &self.config;
        let method = match (self.config.use_dora, *use_rslora) {
            (false, _) if self.config.alora_invocation_tokens.is_some() => "aLoRA",
            (true, false) => "DoRA",
            (true, true) => "rsDoRA",
            (false, true) => "rsLoRA",
            (false, false) => "LoRA",
        };
        let patterns =
            if self.config.rank_pattern.is_empty() && self.config.alpha_pattern.is_empty() {
                ""
            } else {
                " with patterns"
            };
        let dropout = match *dropout {
            0.0 => String::new(),
            dropout => format!(" dropout={dropout}"),
        };
        let start = match self.config.init_lora_weights {
            init if init.changes_base() || init.needs_data() => format!(" {}", init.name()),
            _ => String::new(),
        };
        format!("{method} r={rank} alpha={alpha}{dropout}{patterns}{start}")
    }
}
