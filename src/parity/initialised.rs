//! An adapter whose start changed the base: the run that trained it, beside the plain LoRA that was saved of it.

use super::adapted::{Adapted, Recorded};
use super::arch::{FORWARD, norm};
use super::case::Case;
use super::compare::Comparison;
use ferrotune_core::adapter::BaseWeights;
use ferrotune_core::data::PackedBatch;
use ferrotune_core::io::SafetensorsFile;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::DType;
use ferrotune_lora::{InitLoraWeights, LoraAdapter, LoraConfig, PeftConfig, Start};
use serde_json::Value;
use std::path::Path;

/// How far apart two random starts of a subspace iteration may leave the norm of what is left of a weight:
/// over 200 seeds, PyTorch's are up to 1.9 % above the least that any factors of the rank leave.
const ITERATED: f64 = 0.02;

/// The run of a case whose start has a name.
pub(super) struct Initialised<'a> {
    case: &'a Case,
    base: &'a Path,
    config: LoraConfig,
}

impl<'a> Initialised<'a> {
    /// The run of `case`, if its adapter is not what it was trained as.
    pub(super) fn of(case: &'a Case, base: &'a Path) -> Result<Option<Self>> {
        let Some(name) = case.json.get("init").and_then(Value::as_str) else {
            return Ok(None);
        };
        let fault = |fault| Error::config("init", fault);
        let init = InitLoraWeights::from_name(name).map_err(fault)?;
        let PeftConfig::Lora(config) = PeftConfig::load(&case.path("initial_adapter"))? else {
            return Err(fault("is for LoRA alone".to_owned()));
        };
        let config = LoraConfig {
            init_lora_weights: init,
            ..config
        };
        Ok(Some(Self { case, base, config }))
    }

    /// The model as it was trained: base and adapter of the run.
    pub(super) fn trained(&self) -> Result<Adapted> {
        let directory = self.case.path("adapter");
        let method = self.method(self.config.init_lora_weights)?;
        let start = method.start_of(&directory)?;
        let method = match start {
            Some(start) => method.starting_from(start)?,
            None => method,
        };
        self.model(&method, Some(&directory))
    }

    /// Compares the start that was recorded with the one made here.
    pub(super) fn compare_start(
        &self,
        c: &mut Comparison,
        recorded: &Recorded<'_>,
        batch: &PackedBatch,
    ) -> Result<()> {
        let initial = SafetensorsFile::open(
            self.case
                .path("initial_adapter")
                .join("adapter_model.safetensors"),
        )?;
        let init = self.config.init_lora_weights;
        let saved = self.method(init)?.start_of(&self.case.path("adapter"))?;
        for (name, values) in saved.iter().flat_map(named) {
            let same = initial.read_f32(name)? == values;
            c.exact("start in the plain LoRA", name, same);
        }
        let ours = self.model(&self.method(init)?, None)?;
        let iterated = matches!(
            init,
            InitLoraWeights::Pissa {
                iterations: Some(_)
            }
        );
        let names = recorded.file.names();
        for name in names.filter_map(|name| name.strip_prefix("residual.")) {
            let theirs = recorded.file.read_f32(&format!("residual.{name}"))?;
            let ours = weight(&ours, name)?;
            if iterated {
                let [ours, theirs] = [&ours, &theirs].map(|values| norm(values));
                c.number("residual norm", name, ours, theirs, ITERATED);
            } else {
                c.tensor("residual", name, &ours, &theirs, FORWARD);
            }
        }
        let started = ours.run(DType::F32, batch)?;
        let initial = Recorded {
            prefix: "initial_",
            ..*recorded
        };
        initial.compare_logits(c, "initial logits", &started)
    }

    fn method(&self, init: InitLoraWeights) -> Result<LoraAdapter> {
        let config = LoraConfig {
            init_lora_weights: init,
            ..self.config.clone()
        };
        let model_type = ferrotune_core::model::DecoderConfig::open(self.base)?.model_type;
        LoraAdapter::new(config, &model_type)
    }

    fn model(&self, method: &LoraAdapter, directory: Option<&Path>) -> Result<Adapted> {
        Adapted::with(
            self.base,
            method,
            directory,
            DType::F32,
            &self.case.device,
            Ok,
        )
    }
}

/// The factors of a start by their names on disk.
fn named(start: &Start) -> impl Iterator<Item = (&str, &[f32])> {
    let factors = start.factors();
    let segments = factors.layout().by_name();
    segments.map(|(id, segment)| (segment.spec.name.as_str(), factors.get(id)))
}

/// The weight of a frozen linear, as it is held.
fn weight(adapted: &Adapted, name: &str) -> Result<Vec<f32>> {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let site = adapted.model.find(module).ok_or_else(|| {
        let message = format!("`residual.{name}` is of no linear");
        Error::config("expected.safetensors", message)
    })?;
    Ok(adapted.model.read(site)?.to_f32_vec())
}
