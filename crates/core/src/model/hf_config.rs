//! `config.json` of a Hugging Face model, read key by key with errors that name file and key.

use crate::io::gguf;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Larger files are no configs.
const MAX_BYTES: u64 = 4 << 20;

/// The keys of a `config.json`.
#[derive(Clone, Debug)]
pub struct HfConfig {
    path: PathBuf,
    keys: Map<String, Value>,
}

impl HfConfig {
    /// Reads `directory/config.json`, or the keys of a GGUF file where that is all there is.
    ///
    /// # Errors
    /// [`Error::Model`] if it is missing or not a JSON object.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("config.json");
        if !path.exists()
            && directory.is_dir()
            && let Some(file) = gguf::find(directory)?
        {
            return Self::from_value(&file, gguf::config(&file)?);
        }
        Self::open_file(&path)
    }

    /// Reads a config file by its own name.
    ///
    /// # Errors
    /// [`Error::Model`] if it is missing or not a JSON object.
    pub fn open_file(path: &Path) -> Result<Self> {
        let about = std::fs::metadata(path).map_err(|e| {
            Error::model(
                path,
                format!("{e}; a Hugging Face model directory has a config.json"),
            )
        })?;
        if !about.is_file() {
            return Err(Error::model(path, "is no regular file"));
        }
        let size = about.len();
        if size > MAX_BYTES {
            return Err(Error::model(
                path,
                format!("is {size} bytes, more than any config.json"),
            ));
        }
        let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| Error::model(path, format!("is not valid JSON: {e}")))?;
        Self::from_value(path, value)
    }

    /// Wraps an already parsed config; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Model`] if it is not a JSON object.
    pub fn from_value(path: &Path, value: Value) -> Result<Self> {
        match value {
            Value::Object(keys) => Ok(Self {
                path: path.into(),
                keys,
            }),
            _ => Err(Error::model(path, "must be a JSON object")),
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys.
    #[must_use]
    pub fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    /// An error about `key` of this file.
    #[must_use]
    pub fn error(&self, key: &str, message: impl AsRef<str>) -> Error {
        Error::model(&self.path, format!("`{key}`: {}", message.as_ref()))
    }

    /// The value of `key`, unless absent or null.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|v| !v.is_null())
    }

    /// The same with `value` under `key`.
    #[must_use]
    pub fn with(&self, key: &str, value: Value) -> Self {
        let mut keys = self.keys.clone();
        keys.insert(key.into(), value);
        Self {
            path: self.path.clone(),
            keys,
        }
    }

    /// The same with the keys of the object `defaults` that are absent. A null stays null.
    #[must_use]
    pub fn with_defaults(&self, defaults: &Value) -> Self {
        let mut keys = defaults.as_object().cloned().unwrap_or_default();
        keys.extend(self.keys.clone());
        Self {
            path: self.path.clone(),
            keys,
        }
    }

    /// Refuses a key that is true: it asks for what is not computed here.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key, if it is neither false, null nor absent.
    pub fn require_false(&self, key: &str) -> Result<()> {
        match self.flag_or(key, false)? {
            false => Ok(()),
            true => Err(self.error(key, "is true, which is not supported; expected false")),
        }
    }

    /// A number above zero that an f32 holds, or none where it is absent or null.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key.
    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|v| *v > 0.0) {
            Some(number) if (number as f32).is_normal() => Ok(Some(number)),
            Some(_) => Err(self.error(
                key,
                format!("is {value}; expected a number that 32 bits hold"),
            )),
            None => Err(self.error(key, format!("is {value}; expected a number above 0"))),
        }
    }

    /// A positive integer that must be there.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.size_or(key, None)
    }

    /// A positive integer, or `default`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key if it is absent without a default, or no positive integer.
    pub fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize> {
        match (self.get(key), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.error(key, "is missing; expected a positive integer")),
            (Some(value), _) => match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
                Some(v) if v > 0 && v < (1 << 40) => Ok(v),
                _ => Err(self.error(key, format!("is {value}; expected a positive integer"))),
            },
        }
    }

    /// A finite number, or `default`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|v| v.is_finite())
                .ok_or_else(|| self.error(key, format!("is {value}; expected a number"))),
        }
    }

    /// true or false, or `default`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.error(key, format!("is {value}; expected true or false"))),
        }
    }

    /// A string, or `default`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the key.
    pub fn text_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_str()
                .ok_or_else(|| self.error(key, format!("is {value}; expected a string"))),
        }
    }
}
