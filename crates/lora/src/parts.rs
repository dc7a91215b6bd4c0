//! Methods that train parts of the base and nothing else: norms (LN tuning), or rows of a table
//! (trainable tokens).
//!
//! # Source
//! Zhao et al.: "Tuning LayerNorm in Attention" (2023); files and names: PEFT's `LN_TUNING` and
//! `TRAINABLE_TOKENS`.

use crate::PeftConfig;
use crate::beside::{Biases, Whole};
use crate::files::CONFIG_FILE;
use crate::lora::{LoraConfig, TokenIndices, read_tensors, tokens, write_tensors};
use crate::modules;
use crate::names::{self, Part};
use crate::target::{self, ExcludeModules, Selection, TargetModules};
use ferrotune_core::adapter::{Adapter, Attachment, Site, SiteId, SiteKind};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result, io, suggest};
use ferrotune_kernels::rng::{Stream, key_for};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Which parts.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// `LN_TUNING`.
    Norms,
    /// `TRAINABLE_TOKENS`.
    Rows {
        indices: Vec<u32>,
        /// Start from the base's rows, not from normal ones.
        from_base: bool,
    },
}

impl Kind {
    /// The same with each token once.
    fn distinct(mut self) -> Self {
        if let Self::Rows { indices, .. } = &mut self {
            *indices = tokens::counting(indices).map(|at| indices[at]).collect();
        }
        self
    }
}

/// The configuration of a method that trains parts of the base.
#[derive(Clone, Debug, PartialEq)]
pub struct PartsConfig {
    kind: Kind,
    /// The keys that LoRA has too.
    common: LoraConfig,
}

impl PartsConfig {
    /// Reads the object of an `adapter_config.json` of this `peft_type`, `None` if that is no such
    /// method.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming `path`, the key, its value and what was expected.
    pub(crate) fn from_json(
        path: &Path,
        peft_type: &str,
        object: &Map<String, Value>,
    ) -> Result<Option<Self>> {
        let mut common = object.clone();
        let kind = match peft_type {
            "LN_TUNING" => Kind::Norms,
            "TRAINABLE_TOKENS" => Kind::Rows {
                indices: indices(path, common.remove("token_indices"))?,
                from_base: common.remove("init_weights") != Some(Value::Bool(false)),
            },
            _ => return Ok(None),
        };
        // PEFT's trainable tokens have no such key.
        let saved = common.get("modules_to_save").filter(|v| !v.is_null());
        if let Some(saved) = saved.filter(|_| kind != Kind::Norms) {
            let message = format!("`modules_to_save` is {saved}: not supported with {peft_type}");
            return Err(Error::adapter(path, message));
        }
        let common = LoraConfig::from_json(path, &common)?;
        Ok(Some(Self { kind, common }))
    }

    /// Reads the object that a training configuration holds under `key`, `None` if its `peft_type` is no such method.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key, its value and what was expected, for an unknown key too.
    pub(crate) fn from_config(
        key: &'static str,
        peft_type: &str,
        object: &Map<String, Value>,
    ) -> Result<Option<Self>> {
        let known: &[&str] = match peft_type {
            "LN_TUNING" => &[
                "peft_type",
                "target_modules",
                "exclude_modules",
                "modules_to_save",
            ],
            "TRAINABLE_TOKENS" => &[
                "peft_type",
                "target_modules",
                "exclude_modules",
                "token_indices",
                "init_weights",
            ],
            _ => return Ok(None),
        };
        if let Some(unknown) = object.keys().find(|name| !known.contains(&name.as_str())) {
            let near = suggest::did_you_mean(unknown, known.iter().copied());
            let message = format!(
                "is no key of {peft_type}{near}; its keys: {}",
                known.join(", ")
            );
            return Err(Error::config(format!("{key}.{unknown}"), message));
        }
        let read = Self::from_json(Path::new(key), peft_type, object);
        let mut config = read.map_err(|error| match error {
            Error::Adapter { message, .. } => Error::config(key, message),
            other => other,
        })?;
        if let Some(config) = &mut config {
            config.common.task_type = LoraConfig::default().task_type;
        }
        Ok(config)
    }

    /// The same for a base of this path or name.
    pub(crate) fn for_base(mut self, base: &Path) -> Self {
        self.common.base_model_name_or_path = Some(base.display().to_string());
        self
    }

    /// The same for a task of PEFT's.
    pub(crate) fn for_task(mut self, task: &str) -> Self {
        self.common = self.common.for_task(task);
        self
    }

    /// Path or hub name of the base model.
    pub(crate) fn base_model_name_or_path(&self) -> Option<&str> {
        self.common.base_model_name_or_path.as_deref()
    }

    /// The tokens that rows are of.
    pub(crate) fn tokens(&self) -> Option<TokenIndices> {
        match &self.kind {
            Kind::Norms => None,
            Kind::Rows { indices, .. } => Some(TokenIndices::Embedding(indices.clone())),
        }
    }

    fn peft_type(&self) -> &'static str {
        match self.kind {
            Kind::Norms => "LN_TUNING",
            Kind::Rows { .. } => "TRAINABLE_TOKENS",
        }
    }

    fn to_json(&self) -> String {
        let targets = match &self.common.target_modules {
            None => Value::Null,
            Some(TargetModules::AllLinear) => json!("all-linear"),
            Some(TargetModules::Regex(source)) => json!(source),
            Some(TargetModules::List(names)) => {
                let mut names = names.clone();
                names.sort_unstable();
                json!(names)
            }
        };
        let mut keys = json!({
            "auto_mapping": null,
            "base_model_name_or_path": self.common.base_model_name_or_path,
            "inference_mode": true,
            "peft_type": self.peft_type(),
            "revision": self.common.revision,
            "target_modules": targets,
            "task_type": self.common.task_type,
        });
        match &self.common.exclude_modules {
            None => {}
            Some(ExcludeModules::Regex(source)) => keys["exclude_modules"] = json!(source),
            Some(ExcludeModules::List(names)) => keys["exclude_modules"] = json!(names),
        }
        let saved = modules::as_in_file(
            self.common.task_type.as_deref(),
            &self.common.modules_to_save,
        );
        if !saved.is_empty() {
            keys["modules_to_save"] = json!(saved);
        }
        if let Kind::Rows { indices, from_base } = &self.kind {
            keys["token_indices"] = json!(indices);
            keys["init_weights"] = json!(from_base);
        }
        format!("{keys:#}")
    }
}

fn indices(path: &Path, value: Option<Value>) -> Result<Vec<u32>> {
    let value = value.unwrap_or_default();
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = value
        .as_array()
        .and_then(|items| items.iter().map(id).collect());
    ids.ok_or_else(|| {
        let message = format!("`token_indices` is {value}, expected a list of token ids");
        Error::adapter(path, message)
    })
}

/// Trains norms, or rows of a table.
#[derive(Clone, Debug)]
pub struct PartsAdapter {
    config: PartsConfig,
}

impl PartsAdapter {
    /// The method for a base of `model_type`, which decides the norms where none are named.
    pub(crate) fn new(mut config: PartsConfig, model_type: &str) -> Result<Self> {
        config.kind = config.kind.distinct();
        if config.kind == Kind::Norms && config.common.target_modules.is_none() {
            let names: &[&str] = match model_type {
                "llama" | "mistral" | "gemma" => {
                    &["input_layernorm", "post_attention_layernorm", "norm"]
                }
                "gemma2" | "gemma3_text" => &[
                    "input_layernorm",
                    "post_attention_layernorm",
                    "pre_feedforward_layernorm",
                    "post_feedforward_layernorm",
                    "norm",
                ],
                "qwen2" | "qwen3" => &["post_attention_layernorm"],
                "gpt2" => &["ln_1", "ln_2", "ln_f"],
                _ => {
                    let message = format!(
                        "is not set, and LN tuning has no default for model type `{model_type}`; name norms"
                    );
                    return Err(Error::config("target_modules", message));
                }
            };
            let names = names.iter().map(|&name| name.into()).collect();
            config.common.target_modules = Some(TargetModules::List(names));
        }
        Ok(Self { config })
    }

    fn select<'a>(&self, sites: &'a [Site], targets: &TargetModules) -> Result<Vec<&'a Site>> {
        let selection = Selection {
            target_modules: targets,
            exclude_modules: self.config.common.exclude_modules.as_ref(),
            layers_to_transform: None,
            layers_pattern: &[],
        };
        target::select(sites, &selection)
    }
}

impl Adapter for PartsAdapter {
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let targets = self.config.common.target_modules.as_ref();
        match (&self.config.kind, targets) {
            (Kind::Norms, targets) => {
                let none = TargetModules::List(Vec::new());
                let whole = Whole::of(self.config.common.wanted(), sites)?;
                let mut norms = self.select(sites, targets.unwrap_or(&none))?;
                whole.leave_out(&mut norms);
                whole.require_some(&norms)?;
                let adapted = norms.iter().map(|site| site.id).collect();
                let trained = norms.into_iter().map(|site| train_norm(site, params));
                let mut attachments: Vec<_> = trained.collect::<Result<_>>()?;
                attachments.extend(whole.attach(Biases::None, &adapted, params));
                Ok(attachments)
            }
            (Kind::Rows { indices, .. }, targets) => {
                let task = self.config.common.task_type.as_deref();
                modules::require_tokens(task, self.config.peft_type())?;
                let tokens = match targets {
                    None => TokenIndices::Embedding(indices.clone()),
                    Some(targets) => {
                        let tables = self.select(sites, targets)?.into_iter();
                        let named = tables.map(|site| (site.name.clone(), indices.clone()));
                        TokenIndices::Modules(named.collect())
                    }
                };
                let rows = tokens::rows("token_indices", &tokens, sites, false)?.into_iter();
                let part = Part::TokenRowsAlone;
                Ok(rows
                    .map(|rows| (rows.site.id, tokens::declare(rows, part, params)))
                    .collect())
            }
        }
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        if !matches!(
            self.config.kind,
            Kind::Rows {
                from_base: false,
                ..
            }
        ) {
            return Ok(());
        }
        let layout = params.layout().clone();
        for (id, segment) in layout.by_name() {
            let mut stream = Stream::new(key_for(seed, &segment.spec.name));
            let values = params.get_mut(id).iter_mut();
            values.for_each(|value| *value = stream.normal() as f32);
        }
        Ok(())
    }

    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        params.read_back()?;
        write_tensors(params, directory)?;
        let text = self.config.to_json();
        io::write_file(&directory.join(CONFIG_FILE), text.as_bytes())?;
        let mut read = FlatBuffer::zeros(params.layout());
        self.load(&mut read, directory)?;
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
        if params.as_slice().iter().zip(read.as_slice()).all(same) {
            return Ok(());
        }
        let message = "reads back with other values than were written";
        Err(Error::adapter(directory, message))
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        match PeftConfig::load(directory)? {
            PeftConfig::Parts(saved) if saved.kind.clone().distinct() == self.config.kind => {
                read_tensors(params, directory, saved.tokens())
            }
            _ => {
                let message = format!("is of another method than this {}", self.describe());
                Err(Error::adapter(directory.join(CONFIG_FILE), message))
            }
        }
    }

    fn describe(&self) -> String {
        match &self.config.kind {
            Kind::Norms => "LN tuning".into(),
            Kind::Rows { indices, .. } => format!("trainable tokens ({})", indices.len()),
        }
    }
}

fn train_norm(site: &Site, params: &mut ParamLayoutBuilder) -> Result<(SiteId, Attachment)> {
    if site.kind != SiteKind::Norm {
        let message = format!(
            "`{}` is no norm, and LN tuning trains norms; leave it out",
            site.name
        );
        return Err(Error::config("target_modules", message));
    }
    let mut add = |part| {
        let name = names::tensor(&site.name, part);
        let shape = [site.out_features];
        let mut spec = ParamSpec::new(name, shape, site.execution_order);
        // `ln_tuning_layers` names no norm, but a norm is what it is.
        spec.weight_decay = false;
        params.add(spec)
    };
    let weight = add(Part::TunedNormWeight);
    let bias = site.bias.then(|| add(Part::TunedNormBias));
    Ok((site.id, Attachment::TrainBase { weight, bias }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{golden, llama_sites};

    /// The recorded adapter on a Llama of two layers.
    fn recorded(case: &str) -> (Box<dyn Adapter>, FlatBuffer) {
        let directory = golden(case).join("adapter");
        let adapter = crate::testing::load(&directory).expect("fixture");
        let mut params = ParamLayoutBuilder::new();
        adapter
            .attach(&llama_sites(2), &mut params)
            .expect("attaches");
        let mut params = FlatBuffer::zeros(&params.build().expect("unique names"));
        adapter.load(&mut params, &directory).expect("fixture");
        (adapter, params)
    }

    #[test]
    fn what_peft_saved_is_written_again_under_the_same_names() {
        for case in ["ln_tuning", "trainable_tokens_only"] {
            let (adapter, params) = recorded(case);
            let copy = tempfile::tempdir().expect("temporary directory");
            adapter
                .save(&params, copy.path())
                .expect("saved and read back");
            let theirs = golden(case).join("adapter");
            let found = crate::inspect::difference(copy.path(), &theirs).expect("both read");
            assert!(
                found.only_first.is_empty() && found.only_second.is_empty(),
                "{found:?}"
            );
            assert!(
                found.relative.iter().all(|(_, r)| *r == Some(0.0)),
                "{found:?}"
            );
            let absent =
                |(_, ours, theirs): &(String, Value, Value)| ours.is_null() || theirs.is_null();
            assert!(found.config.iter().all(absent), "{:?}", found.config);
        }
    }

    #[test]
    fn a_linear_is_no_norm_and_another_method_is_refused() {
        let (tokens, mut params) = recorded("trainable_tokens_only");
        let other = golden("ln_tuning").join("adapter");
        let error = tokens
            .load(&mut params, &other)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("another method"), "{error}");
        let path = Path::new("adapter_config.json");
        let keys = json!({"target_modules": ["norm", "q_proj"]});
        let object = keys.as_object().expect("an object");
        let config = PartsConfig::from_json(path, "LN_TUNING", object).expect("read");
        let adapter = PartsAdapter::new(config.expect("known"), "llama").expect("valid");
        let error = adapter.attach(&llama_sites(2), &mut ParamLayoutBuilder::new());
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("q_proj` is no norm"), "{error}");
    }

    /// PEFT 0.21.2 refuses the first two with a `TypeError`, cannot save the third, and loads the others.
    #[test]
    fn a_norm_that_is_tuned_and_trained_as_a_whole_is_refused() {
        let attached = |targets: &Value, saved: &str| {
            let keys = json!({"peft_type": "LN_TUNING", "target_modules": targets, "modules_to_save": [saved]});
            let object = keys.as_object().expect("an object");
            let config = PeftConfig::from_config("peft_config", object)?;
            let adapter = config.into_adapter("llama")?;
            adapter.attach(&llama_sites(2), &mut ParamLayoutBuilder::new())
        };
        for (targets, saved, both) in [
            (Value::Null, "norm", "model.layers.0.input_layernorm"),
            (
                json!(["input_layernorm"]),
                "norm",
                "model.layers.0.input_layernorm",
            ),
            (
                json!(["input_layernorm"]),
                "ayers.1",
                "model.layers.1.input_layernorm",
            ),
        ] {
            let error = attached(&targets, saved).expect_err("refused").to_string();
            let parts = [
                "`modules_to_save`",
                saved,
                both,
                "take it or `input_layernorm` out",
            ];
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        for (targets, saved) in [
            (json!(["norm"]), "input_layernorm"),
            (json!(["input_layernorm", "norm"]), "model.norm"),
            (json!(["input_layernorm"]), "layers.0"),
            (json!(["input_layernorm"]), "lm_head"),
        ] {
            attached(&targets, saved).expect(saved);
        }
    }

    #[test]
    fn of_a_token_that_is_named_twice_the_last_row_counts() {
        let path = Path::new("adapter_config.json");
        let keys = json!({"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5, 3], "target_modules": ["embed_tokens"]});
        let object = keys.as_object().expect("an object");
        let config = PartsConfig::from_json(path, "TRAINABLE_TOKENS", object).expect("read");
        let config = config.expect("known");
        let rows = names::tensor("model.embed_tokens", Part::TokenRowsAlone);
        let counting = PeftConfig::Parts(config.clone()).counting_rows(&rows);
        assert_eq!(counting, Some(vec![1, 2]));
        let adapter = PartsAdapter::new(config, "llama").expect("valid");
        let all = adapter.attach(&llama_sites(2), &mut ParamLayoutBuilder::new());
        let all = all.expect("attaches");
        let [(_, Attachment::TrainRows { indices, .. })] = &all[..] else {
            panic!("{all:?}")
        };
        assert_eq!(indices, &[5, 3]);
    }
}
