//! Prompt tuning, p-tuning and prefix tuning: trained rows before every document, and no weight changed.
//!
//! The rows are parameters themselves, or what a small encoder makes of others; then they are made once per
//! optimizer step, and the gradient goes back through the encoder once per step.
//!
//! # Source
//! Lester et al.: "The Power of Scale for Parameter-Efficient Prompt Tuning" (2021); Liu et al.: "GPT
//! Understands, Too" (2021); Li and Liang: "Prefix-Tuning" (2021). PEFT's `tuners/prompt_tuning`, `p_tuning`
//! and `prefix_tuning`.

mod config;
mod encoder;
mod files;
mod linear;
mod lstm;
mod start;
#[cfg(test)]
mod tests;

use crate::method::{Configured, Init, Keys, Source};
use crate::modules;
use config::{Kind, PromptConfig};
use encoder::Encoder;
use ferrotune_core::adapter::{
    Adapter, Attachment, BaseWeights, KeyHeads, Penalty, Prompt, PromptOf, Site, SiteId, SiteKind,
    StepDone,
};
use ferrotune_core::params::{FlatBuffer, ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::OnceLock;

/// Name of the rows where an encoder makes them, and in files.
const ROWS: &str = "prompt_embeddings";
/// Name of what is trained first: the rows themselves, or what the encoder reads.
const EMBEDDING: &str = "prompt_encoder.embedding.weight";

/// Reads the configuration of a method.
pub(crate) fn configure(
    source: Source<'_>,
    object: &Map<String, Value>,
) -> Result<Box<dyn Configured>> {
    let mut keys = Keys::new(source, object);
    let config = PromptConfig::read(&mut keys)?;
    keys.finish()?;
    Ok(Box::new(PromptAdapter {
        config,
        attached: OnceLock::new(),
    }))
}

/// A prompt before every document.
#[derive(Clone, Debug)]
pub(crate) struct PromptAdapter {
    config: PromptConfig,
    attached: OnceLock<Attached>,
}

/// What is known once the model's shape is.
#[derive(Clone, Debug)]
struct Attached {
    shape: Shape,
    rows: ParamId,
    /// What makes the rows, if they are not parameters themselves.
    encoder: Option<Encoder>,
}

/// The model as far as a prompt depends on it.
#[derive(Clone, Copy, Debug)]
struct Shape {
    hidden: usize,
    layers: usize,
    keys: KeyHeads,
}

impl Configured for PromptAdapter {
    fn base_model_name_or_path(&self) -> Option<&str> {
        self.config.base_model_name_or_path.as_deref()
    }

    fn clone_box(&self) -> Box<dyn Configured> {
        Box::new(self.clone())
    }

    fn into_adapter(self: Box<Self>, _: &str) -> Result<Box<dyn Adapter>> {
        Ok(self)
    }

    fn for_base(mut self: Box<Self>, base: &Path) -> Box<dyn Configured> {
        self.config.base_model_name_or_path = Some(base.display().to_string());
        let task = &mut self.config.task_type;
        task.get_or_insert_with(|| "CAUSAL_LM".into());
        self
    }

    fn for_task(mut self: Box<Self>, task: &str) -> Box<dyn Configured> {
        self.config.task_type = Some(task.into());
        self
    }
}

impl Adapter for PromptAdapter {
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        modules::require_tokens(self.config.task_type.as_deref(), self.config.peft_type())?;
        let (site, shape) = shape(sites)?;
        let (tokens, width) = (self.config.tokens, self.config.width(&shape)?);
        let mut encoder = Encoder::new(&self.config, &shape, |name, shape| {
            params.add(ParamSpec::new(name, shape, 0))
        });
        let rows = match &mut encoder {
            None => params.add(ParamSpec::new(EMBEDDING, [tokens, width], 0)),
            Some(_) => {
                let mut rows = ParamSpec::new(ROWS, [tokens, width], 0);
                (rows.lr_scale, rows.weight_decay) = (0.0, false);
                params.add(rows)
            }
        };
        self.attached.get_or_init(|| Attached {
            shape,
            rows,
            encoder,
        });
        let of = match self.config.kind {
            Kind::Prefix { .. } => PromptOf::KeysAndValues,
            Kind::Prompt { .. } | Kind::PTuning { .. } => PromptOf::Embeddings,
        };
        let prompt = Prompt { rows, tokens, of };
        Ok(vec![(site, Attachment::Prompt(prompt))])
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        let layout = params.layout().clone();
        for (_, segment) in layout.by_name() {
            let (name, shape) = (&segment.spec.name, &segment.spec.shape);
            self.start_of(name, shape).fill(params, name, seed);
        }
        self.encode(params)
    }

    fn prepare(&self, params: &mut FlatBuffer, base: &mut dyn BaseWeights) -> Result<()> {
        match (&self.config.kind, self.attached.get()) {
            (Kind::Prompt { start }, Some(attached)) => {
                start.prepare(&self.config, attached.rows, params, base)
            }
            _ => Ok(()),
        }
    }

    fn completes_gradients(&self) -> bool {
        let attached = self.attached.get();
        attached.is_some_and(|attached| attached.encoder.is_some())
    }

    /// From the gradient of the rows to that of what they are made of.
    fn complete_gradients(
        &self,
        params: &FlatBuffer,
        _: f32,
        grads: &mut FlatBuffer,
    ) -> Result<Penalty> {
        if let Some(Attached {
            rows,
            encoder: Some(encoder),
            ..
        }) = self.attached.get()
        {
            let d_rows = grads.get(*rows).to_vec();
            grads.get_mut(*rows).fill(0.0);
            encoder.backward(params, grads, &d_rows)?;
        }
        Ok(Penalty::default())
    }

    fn after_step(&self, params: &mut FlatBuffer, _: StepDone<'_>) -> Result<()> {
        self.encode(params)
    }

    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        params.read_back()?;
        let attached = self.attached.get().ok_or_else(not_attached)?;
        files::save(
            &self.config,
            &attached.shape,
            attached.rows,
            params,
            directory,
        )
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        let attached = self.attached.get().ok_or_else(not_attached)?;
        files::load(attached.rows, params, directory)
    }

    fn describe(&self) -> String {
        self.config.describe()
    }
}

impl PromptAdapter {
    /// Makes the rows, where they are made.
    fn encode(&self, params: &mut FlatBuffer) -> Result<()> {
        if let Some(Attached {
            rows,
            encoder: Some(encoder),
            ..
        }) = self.attached.get()
        {
            let values = encoder.forward(params)?;
            params.get_mut(*rows).copy_from_slice(&values);
        }
        Ok(())
    }

    /// As PyTorch starts embeddings, linears and LSTMs.
    fn start_of(&self, name: &str, shape: &[usize]) -> Init {
        let starts_at_zero = match &self.config.kind {
            Kind::Prefix { zero, projection } => {
                *zero && (projection.is_none() || name.contains("transform.2"))
            }
            Kind::Prompt { .. } | Kind::PTuning { .. } => false,
        };
        if starts_at_zero {
            return Init::Constant(0.0);
        }
        if name == EMBEDDING {
            return Init::Normal {
                mean: 0.0,
                std: 1.0,
            };
        }
        if name == ROWS {
            return Init::Constant(0.0);
        }
        let of_encoder = self.attached.get().and_then(|a| a.encoder.as_ref());
        let fan_in = of_encoder.map_or(1, |encoder| encoder.fan_in(name, shape));
        Init::kaiming(fan_in)
    }
}

/// The embedding's site, and the model's shape.
fn shape(sites: &[Site]) -> Result<(SiteId, Shape)> {
    let embedding = sites.iter().find(|site| site.kind == SiteKind::Embedding);
    let keys: Vec<KeyHeads> = sites.iter().filter_map(|site| site.keys).collect();
    match (embedding, keys.first()) {
        (Some(site), Some(first)) => {
            let shape = Shape {
                hidden: site.in_features,
                layers: keys.len(),
                keys: *first,
            };
            Ok((site.id, shape))
        }
        _ => Err(Error::config(
            "peft_type",
            "a prompt needs a model with an embedding and attention",
        )),
    }
}

fn not_attached() -> Error {
    Error::config("peft_type", "the prompt is not attached to a model yet")
}
