//! From a `peft_type` to the method.

mod absent;

use crate::beside::tied;
use crate::files::{CONFIG_FILE, Weights};
use crate::lora::tokens::counting;
use crate::lora::{LoraAdapter, LoraConfig};
use crate::method::{Configured, Source};
use crate::methods::METHODS;
use crate::modules::{self, SEQUENCE_CLASSIFICATION};
use crate::names;
use crate::parts::{PartsAdapter, PartsConfig};
use ferrotune_core::adapter::Adapter;
use ferrotune_core::model::{Classifier, DecoderConfig};
use ferrotune_core::{Error, Result, suggest};
use serde_json::{Map, Value};
use std::io::Read;
use std::path::Path;

/// Methods that PEFT has and this crate does not.
const NOT_SUPPORTED: &[&str] = &[
    "ADAMSS",
    "ADAPTION_PROMPT",
    "BEFT",
    "CARTRIDGE",
    "CPT",
    "DEFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "LILY",
    "MULTITASK_PROMPT_TUNING",
    "OSF",
    "PEANUT",
    "POLY",
    "PSOFT",
    "PVERA",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
    "WAVEFT",
    "XLORA",
];

/// Methods that train parts of the base.
const PARTS: [&str; 2] = ["LN_TUNING", "TRAINABLE_TOKENS"];
/// The same, and LoRA, which a training configuration has keys of its own for.
const WITH_LORA: [&str; 3] = ["LORA", PARTS[0], PARTS[1]];

/// An `adapter_config.json` larger than this is not one.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A method with its configuration.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PeftConfig {
    /// `LORA`.
    Lora(LoraConfig),
    /// `LN_TUNING` and `TRAINABLE_TOKENS`.
    Parts(PartsConfig),
    /// Any other method.
    Other(OtherConfig),
}

/// The configuration of a method other than LoRA.
#[derive(Debug)]
pub struct OtherConfig(Box<dyn Configured>);

impl Clone for OtherConfig {
    fn clone(&self) -> Self {
        Self(self.0.clone_box())
    }
}

impl PeftConfig {
    /// Reads the `adapter_config.json` of an adapter directory.
    ///
    /// # Errors
    /// [`Error::Adapter`] if there is none (saying what is there), it is no such file, its method is
    /// not supported, or it switches on a feature that is not; [`Error::Read`].
    pub fn load(directory: &Path) -> Result<Self> {
        Self::read(directory, false)
    }

    fn read(directory: &Path, as_peft: bool) -> Result<Self> {
        let path = directory.join(CONFIG_FILE);
        if !path.exists() {
            return Err(absent::no_adapter(directory));
        }
        let object = read_object(&path)?;
        let Some(peft_type) = peft_type(&object).map_err(|value| {
            let message = no_name(value, &methods(&WITH_LORA));
            Error::adapter(&path, format!("`peft_type` {message}"))
        })?
        else {
            return Err(Error::adapter(
                &path,
                "has no `peft_type`, which every adapter of PEFT has, such as \"LORA\"",
            ));
        };
        match peft_type {
            "LORA" => {
                let mut config = LoraConfig::from_json(&path, &object)?;
                tied::with_head(
                    config.ensure_weight_tying,
                    &mut config.modules_to_save,
                    &mut config.target_modules,
                    directory,
                )?;
                Ok(Self::Lora(config))
            }
            other => match METHODS.iter().find(|(name, _)| *name == other) {
                Some((_, configure)) => {
                    let source = if as_peft {
                        Source::FileAsPeft
                    } else {
                        Source::File
                    };
                    let config = configure(source(&path), &object)?;
                    Ok(Self::Other(OtherConfig(config)))
                }
                None => PartsConfig::from_json(&path, other, &object)?
                    .map(Self::Parts)
                    .ok_or_else(|| not_supported(&path, other)),
            },
        }
    }

    /// Reads the object that a training configuration holds under `key`: PEFT's keys, of any method but
    /// LoRA, which has keys of its own there.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key, for an unknown method or key too.
    pub fn from_config(key: &'static str, object: &Map<String, Value>) -> Result<Self> {
        let at = || format!("{key}.peft_type");
        let found = peft_type(object);
        let found = found.map_err(|value| Error::config(at(), no_name(value, &methods(&PARTS))))?;
        let Some(peft_type) = found else {
            let message = format!("is missing; one of {}", methods(&PARTS).join(", "));
            return Err(Error::config(at(), message));
        };
        let peft_type = peft_type.to_uppercase();
        if peft_type == "LORA" {
            let message =
                "LoRA is configured by lora_r, lora_alpha and its other keys, without this one";
            return Err(Error::config(at(), message));
        }
        match METHODS.iter().find(|(name, _)| *name == peft_type) {
            Some((_, configure)) => Ok(Self::Other(OtherConfig(configure(
                Source::Config(key),
                object,
            )?))),
            None => PartsConfig::from_config(key, &peft_type, object)?
                .map(Self::Parts)
                .ok_or_else(|| Error::config(at(), unknown(&peft_type, &methods(&PARTS)))),
        }
    }

    /// Of the rows that a file has as `tensor`, those that count: of a token that is named twice, the last. `None` if
    /// it has no rows of tokens.
    #[must_use]
    pub fn counting_rows(&self, tensor: &str) -> Option<Vec<usize>> {
        let tokens = match self {
            Self::Lora(config) => config.trainable_token_indices.clone(),
            Self::Parts(config) => config.tokens(),
            Self::Other(_) => None,
        };
        let (module, _) = names::parse(tensor).filter(|(_, part)| part.is_rows())?;
        Some(counting(tokens?.of(module)?).collect())
    }

    /// The method for a base of this path or name, which its files will say.
    #[must_use]
    pub fn for_base(self, base: &Path) -> Self {
        match self {
            Self::Lora(mut config) => {
                config.base_model_name_or_path = Some(base.display().to_string());
                Self::Lora(config)
            }
            Self::Parts(config) => Self::Parts(config.for_base(base)),
            Self::Other(OtherConfig(config)) => Self::Other(OtherConfig(config.for_base(base))),
        }
    }

    /// The method for a task of PEFT's (`task_type`). With `SEQ_CLS` it also trains the head of the classifier.
    #[must_use]
    pub fn for_task(self, task: &str) -> Self {
        match self {
            Self::Lora(config) => Self::Lora(config.for_task(task)),
            Self::Parts(config) => Self::Parts(config.for_task(task)),
            Self::Other(OtherConfig(config)) => Self::Other(OtherConfig(config.for_task(task))),
        }
    }

    /// The base the adapter was trained on, as its file says: a path or a name on the hub.
    #[must_use]
    pub fn base_model_name_or_path(&self) -> Option<&str> {
        match self {
            Self::Lora(config) => config.base_model_name_or_path.as_deref(),
            Self::Other(config) => config.0.base_model_name_or_path(),
            Self::Parts(config) => config.base_model_name_or_path(),
        }
    }

    /// The method for a base of `model_type`, as in the base's `config.json`.
    ///
    /// # Errors
    /// As the method's constructor, such as [`LoraAdapter::new`].
    pub fn into_adapter(self, model_type: &str) -> Result<Box<dyn Adapter>> {
        match self {
            Self::Lora(config) => Ok(Box::new(LoraAdapter::of_file(config, model_type)?)),
            Self::Other(config) => config.0.into_adapter(model_type),
            Self::Parts(config) => Ok(Box::new(PartsAdapter::new(config, model_type)?)),
        }
    }

    /// The same for the adapter in `directory`, which starts from what that one started from.
    fn into_adapter_of(self, directory: &Path, model_type: &str) -> Result<Box<dyn Adapter>> {
        match self {
            Self::Lora(config) => Ok(Box::new(lora_of(config, directory, model_type)?)),
            other => other.into_adapter(model_type),
        }
    }
}

/// The LoRA in `directory`, with what it started from where the files have that.
pub(crate) fn lora_of(
    config: LoraConfig,
    directory: &Path,
    model_type: &str,
) -> Result<LoraAdapter> {
    let adapter = LoraAdapter::of_file(config, model_type)?;
    Ok(match adapter.start_of(directory)? {
        Some(start) => adapter.starting_from(start)?,
        None => adapter,
    })
}

/// The adapter that lies in `directory`, for the model `base`; its tensors are read by [`Adapter::load`] once it is
/// attached.
///
/// # Errors
/// As [`PeftConfig::load`] and [`PeftConfig::into_adapter`]; [`Error::Adapter`] if its `task_type` is of a model with
/// another head.
pub fn load(directory: &Path, base: &DecoderConfig) -> Result<Box<dyn Adapter>> {
    require_task(directory, base.classifier.is_some())?;
    PeftConfig::load(directory)?.into_adapter_of(directory, &base.model_type)
}

/// The number of classes that the adapter in `directory` tells apart, if it is of a classifier with a head of its own.
///
/// # Errors
/// As [`PeftConfig::load`]; [`Error::Adapter`] if its tensors cannot be read.
pub fn classes_of(directory: &Path) -> Result<Option<usize>> {
    let path = directory.join(CONFIG_FILE);
    if !path.exists() {
        return Err(absent::no_adapter(directory));
    }
    let task = read_object(&path)?.get("task_type").cloned();
    if task.as_ref().and_then(Value::as_str) != Some(SEQUENCE_CLASSIFICATION) {
        return Ok(None);
    }
    let weights = Weights::open(directory)?;
    let head = weights.file.meta(modules::CLASSIFIER_WEIGHT);
    let Some(&classes) = head.and_then(|meta| meta.shape.first()) else {
        return Ok(None);
    };
    if !Classifier::CLASSES.contains(&classes) {
        let message = format!(
            "`{}` has {classes} rows; expected 2 or more. A head of one row is trained by regression, which is not \
             supported",
            modules::CLASSIFIER_WEIGHT
        );
        return Err(Error::adapter(directory, message));
    }
    Ok(Some(classes))
}

/// [`load`] for comparisons with PEFT: computes what PEFT computes where that is wrong.
///
/// C3A's gradient of its input alone differs: PEFT convolves with the kernel where it should correlate.
///
/// # Errors
/// As [`load`].
pub fn load_as_peft(directory: &Path, base: &DecoderConfig) -> Result<Box<dyn Adapter>> {
    PeftConfig::read(directory, true)?.into_adapter_of(directory, &base.model_type)
}

/// Refuses the adapter in `directory` for a base with another head than its own: a classifier's, or a causal language
/// model's.
///
/// # Errors
/// [`Error::Adapter`] naming its `task_type`.
pub(crate) fn require_task(directory: &Path, base_classifies: bool) -> Result<()> {
    let path = directory.join(CONFIG_FILE);
    if !path.exists() {
        return Err(absent::no_adapter(directory));
    }
    let object = read_object(&path)?;
    let task = object.get("task_type").and_then(Value::as_str);
    let other = |task: &str, expected: &str| {
        let message = format!(
            "`task_type` is {task}: an adapter of a model with another head than this base; expected {expected} or null"
        );
        Err(Error::adapter(&path, message))
    };
    match (base_classifies, task) {
        (false, Some(SEQUENCE_CLASSIFICATION)) => {
            let message = format!(
                "`task_type` is {SEQUENCE_CLASSIFICATION}: an adapter with the head of a classifier, and this base is a \
                 language model. Alone it runs over one (`eval`); merged, or beside others, it needs a base that is a \
                 classifier"
            );
            Err(Error::adapter(&path, message))
        }
        (false, Some(task @ ("QUESTION_ANS" | "SEQ_2_SEQ_LM" | "TOKEN_CLS"))) => {
            other(task, "CAUSAL_LM")
        }
        (true, Some(task @ ("CAUSAL_LM" | "QUESTION_ANS" | "SEQ_2_SEQ_LM" | "TOKEN_CLS"))) => {
            other(task, SEQUENCE_CLASSIFICATION)
        }
        _ => Ok(()),
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    // Asked before opening, because opening a pipe would wait for its writer.
    if !std::fs::metadata(path)
        .map_err(Error::read(path))?
        .is_file()
    {
        return Err(Error::adapter(path, "is no regular file"));
    }
    let file = std::fs::File::open(path).map_err(Error::read(path))?;
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::read(path))?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(Error::adapter(
            path,
            format!("is larger than {MAX_CONFIG_BYTES} bytes, expected a few thousand"),
        ));
    }
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::adapter(path, "is JSON, but not an object")),
        Err(error) => Err(Error::adapter(path, format!("is no valid JSON: {error}"))),
    }
}

/// The name of the method, if there is one.
///
/// # Errors
/// What stands there, if that is no text.
fn peft_type(object: &Map<String, Value>) -> Result<Option<&str>, &Value> {
    match object.get("peft_type") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) => Ok(Some(name)),
        Some(other) => Err(other),
    }
}

/// What to say about a value that is no text, where the name of one of `supported` goes.
fn no_name(value: &Value, supported: &[&str]) -> String {
    let list = supported.join(", ");
    format!("is {value}, expected the name of a method as a string; supported: {list}")
}

/// The methods there are, after `first`.
fn methods(first: &[&'static str]) -> Vec<&'static str> {
    let others = METHODS.iter().map(|(name, _)| *name);
    first.iter().copied().chain(others).collect()
}

fn not_supported(path: &Path, peft_type: &str) -> Error {
    let message = unknown(peft_type, &methods(&WITH_LORA));
    Error::adapter(path, format!("`peft_type` {message}"))
}

/// What to say about a method that is not among `supported`.
fn unknown(peft_type: &str, supported: &[&str]) -> String {
    let list = supported.join(", ");
    if NOT_SUPPORTED.contains(&peft_type) {
        return format!(
            "is {peft_type}: this method of PEFT is not supported yet; supported: {list}"
        );
    }
    let near = match peft_type {
        "BONE" => "; earlier versions of PEFT called MISS so: write that".to_owned(),
        _ => suggest::did_you_mean(&peft_type.to_uppercase(), supported.iter().copied()),
    };
    format!("is \"{peft_type}\", which is no method of PEFT{near}; supported: {list}")
}
