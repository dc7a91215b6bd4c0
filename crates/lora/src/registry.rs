//! From a `peft_type` to the method.

mod absent;

use crate::lora::{CONFIG_FILE, LoraAdapter, LoraConfig};
use crate::parts::{PartsAdapter, PartsConfig};
use ferrotune_core::adapter::Adapter;
use ferrotune_core::{Error, Result, suggest};
use serde_json::{Map, Value};
use std::io::Read;
use std::path::Path;

/// Methods of this crate.
const SUPPORTED: [&str; 3] = ["LORA", "LN_TUNING", "TRAINABLE_TOKENS"];

/// Methods that PEFT has and this crate does not.
const NOT_SUPPORTED: &[&str] = &[
    "ADALORA",
    "ADAMSS",
    "ADAPTION_PROMPT",
    "BEFT",
    "BOFT",
    "C3A",
    "CARTRIDGE",
    "CPT",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LILY",
    "LOHA",
    "LOKR",
    "MISS",
    "MULTITASK_PROMPT_TUNING",
    "OFT",
    "OSF",
    "PEANUT",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "PSOFT",
    "PVERA",
    "P_TUNING",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
    "XLORA",
];

/// An `adapter_config.json` larger than this is not one.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A method with its configuration.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum PeftConfig {
    /// `LORA`.
    Lora(LoraConfig),
    /// `LN_TUNING` and `TRAINABLE_TOKENS`.
    Parts(PartsConfig),
}

impl PeftConfig {
    /// Reads the `adapter_config.json` of an adapter directory.
    ///
    /// # Errors
    /// [`Error::Adapter`] if there is none (saying what is there), it is no such file, its method is
    /// not supported, or it switches on a feature that is not; [`Error::Read`].
    pub fn load(directory: &Path) -> Result<Self> {
        let path = directory.join(CONFIG_FILE);
        if !path.exists() {
            return Err(absent::no_adapter(directory));
        }
        let object = read_object(&path)?;
        let Some(peft_type) = object.get("peft_type").and_then(Value::as_str) else {
            return Err(Error::adapter(
                &path,
                "has no `peft_type`, which every adapter of PEFT has, such as \"LORA\"",
            ));
        };
        match peft_type {
            "LORA" => LoraConfig::from_json(&path, &object).map(Self::Lora),
            other => PartsConfig::from_json(&path, other, &object)?
                .map(Self::Parts)
                .ok_or_else(|| not_supported(&path, other)),
        }
    }

    /// The base the adapter was trained on, as its file says: a path or a name on the hub.
    #[must_use]
    pub fn base_model_name_or_path(&self) -> Option<&str> {
        match self {
            Self::Lora(config) => config.base_model_name_or_path.as_deref(),
            Self::Parts(config) => config.base_model_name_or_path(),
        }
    }

    /// The method for a base of `model_type`, as in the base's `config.json`.
    ///
    /// # Errors
    /// As the method's constructor, such as [`LoraAdapter::new`].
    pub fn into_adapter(self, model_type: &str) -> Result<Box<dyn Adapter>> {
        match self {
            Self::Lora(config) => Ok(Box::new(LoraAdapter::new(config, model_type)?)),
            Self::Parts(config) => Ok(Box::new(PartsAdapter::new(config, model_type)?)),
        }
    }
}

/// The adapter that lies in `directory`, for a base of `model_type`; its tensors are read by
/// [`Adapter::load`] once it is attached.
///
/// # Errors
/// As [`PeftConfig::load`] and [`PeftConfig::into_adapter`].
pub fn load(directory: &Path, model_type: &str) -> Result<Box<dyn Adapter>> {
    PeftConfig::load(directory)?.into_adapter(model_type)
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

fn not_supported(path: &Path, peft_type: &str) -> Error {
    let message = if NOT_SUPPORTED.contains(&peft_type) {
        format!(
            "`peft_type` is {peft_type}: this method of PEFT is not supported yet; supported: {}",
            SUPPORTED.join(", ")
        )
    } else {
        format!(
            "`peft_type` is \"{peft_type}\", which is no method of PEFT{}; supported: {}",
            suggest::did_you_mean(peft_type, SUPPORTED),
            SUPPORTED.join(", ")
        )
    };
    Error::adapter(path, message)
}
