//! The configuration of a training run: TRL's flat keys, typed.
//!
//! On disk there is one flat mapping with the names of TRL's `SFTConfig`, `ModelConfig` and
//! `ScriptArguments`, so a YAML file for `trl sft` loads unchanged. In memory the keys are grouped
//! into [`ModelArguments`], [`DataArguments`] and so on. Each group's declaration is the only place
//! that knows a key's name, type, default and documentation; reading, overriding, saving, comparing,
//! [`json_schema`] and [`markdown_reference`] all come from it.
//!
//! Keys of TRL and Transformers without a field here are either an error unless they are off, or
//! noted and ignored ([`TrainConfig::notes`]). Any other key is an error.

mod adapters;
mod arguments;
mod foreign;
mod parse;
mod reference;
mod section;
#[cfg(test)]
mod tests;
mod validate;
mod value;

pub use adapters::{Axis, NamedConfig, Runs, load_runs, runs};
pub use arguments::{
    BadRows, CudaGraph, DataArguments, DdpBackend, Device, Dtype, GemmTuning, InitLoraWeights,
    IntervalStrategy, LoraArguments, LoraBias, ModelArguments, Optim, OptimArgs,
    OptimizerArguments, OutputArguments, PackingStrategy, QuantType, Resume, RuntimeArguments,
    SamplingStrategy, ScheduleArguments, TokenIndices, TruncationMode,
};
pub use reference::{json_schema, markdown_reference};
pub use section::Key;
pub(crate) use value::word_as_bool;
pub use value::{ALL_LINEAR, Arity, KeyValue, Names, is_metacharacter};

use crate::suggest::did_you_mean;
use crate::{Error, Result};
use foreign::ForeignKey;
use parse::Entry;
use section::Section;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::Path;

/// Other names of keys, from TRL's and Transformers' earlier versions.
const ALIASES: [(&str, &str); 4] = [
    ("torch_dtype", "dtype"),
    ("use_bnb_nested_quant", "bnb_4bit_use_double_quant"),
    ("evaluation_strategy", "eval_strategy"),
    ("max_seq_length", "max_length"),
];

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In a file.
    File {
        /// Its name.
        name: String,
        /// The line, from 1, where known.
        line: Option<u64>,
    },
    /// On the command line.
    CommandLine,
}

impl Origin {
    fn file(name: &str, line: Option<u64>) -> Self {
        Self::File {
            name: name.to_owned(),
            line,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File {
                name,
                line: Some(line),
            } => write!(f, "{name}:{line}"),
            Self::File { name, line: None } => f.write_str(name),
            Self::CommandLine => f.write_str("command line"),
        }
    }
}

/// A key whose value differs between two configurations.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The key.
    pub key: &'static str,
    /// Its value in the configuration asked.
    pub old: Value,
    /// Its value in the other one.
    pub new: Value,
}

/// A training run, as configured.
#[derive(Clone, Debug, Default)]
pub struct TrainConfig {
    /// Which model, in which precision.
    pub model: ModelArguments,
    /// Which rows, how they become tokens, how many at a time.
    pub data: DataArguments,
    /// The adapter.
    pub lora: LoraArguments,
    /// How gradients become an update.
    pub optimizer: OptimizerArguments,
    /// How long, and at which learning rate when.
    pub schedule: ScheduleArguments,
    /// What is written where, how often.
    pub output: OutputArguments,
    /// The machine, and chance.
    pub runtime: RuntimeArguments,
    /// One line per key that was set and has no effect, for the user to read.
    pub notes: Vec<String>,
    /// Values set for keys without a field.
    foreign: BTreeMap<&'static str, Value>,
    /// Where each key was set.
    origins: BTreeMap<&'static str, Origin>,
}

/// Reads `path` and the `overrides` (key and value of command line arguments) and validates.
///
/// # Errors
/// [`Error::Config`] as [`TrainConfig::from_yaml`], and for a file that cannot be read, is above 1 MiB
/// or not in UTF-8: what is wrong with it is wrong with the configuration.
pub fn load(path: &Path, overrides: &[(String, String)]) -> Result<TrainConfig> {
    TrainConfig::from_yaml(&read_text(path)?, &path.display().to_string(), overrides)
}

/// The text of a configuration file.
fn read_text(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    let unreadable = |error: std::io::Error| {
        let message = format!("cannot be read: {error}; expected a YAML file with TRL's keys");
        Error::config(&name, message)
    };
    // Of a device the size is no news.
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let size = file
        .take(parse::MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if size as u64 > parse::MAX_BYTES {
        return Err(Error::config(
            &name,
            format!(
                "too large; a configuration has at most {} bytes",
                parse::MAX_BYTES
            ),
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..valid]
            .iter()
            .filter(|b| **b == b'\n')
            .count();
        Error::config(
            format!("{name}:{line}"),
            "not UTF-8; save the file as UTF-8 text",
        )
    })
}

impl TrainConfig {
    /// Reads YAML text, called `name` in messages, and the `overrides`, and validates.
    ///
    /// A later override of the same key wins. Values of overrides are YAML scalars or flow
    /// collections; a list may also be words between commas or blanks; dashes in keys stand for
    /// underscores.
    ///
    /// # Errors
    /// [`Error::Config`] naming key, place, what was expected and the nearest valid name: for text
    /// that is not one YAML mapping within the limits, unknown keys, values of the wrong type, and
    /// everything [`TrainConfig::validate`] refuses.
    pub fn from_yaml(text: &str, name: &str, overrides: &[(String, String)]) -> Result<Self> {
        Self::from_entries(parse::entries(text, name)?, Vec::new(), overrides)
    }

    /// Of the entries of a file, those of an adapter in their place, and what the command line says.
    fn from_entries(
        shared: Vec<Entry>,
        own: Vec<Entry>,
        overrides: &[(String, String)],
    ) -> Result<Self> {
        let mut config = Self::default();
        for entries in [shared, own] {
            let mut seen = BTreeMap::new();
            for entry in entries {
                let (key, origin) = (config.canonical(&entry)?, entry.origin.clone());
                if let Some(earlier) = seen.get(key) {
                    let message = format!("set twice under two names: {earlier} and {origin}");
                    return Err(Error::config(key, message));
                }
                config.set(key, entry)?;
                seen.insert(key, origin);
            }
        }
        for (key, text) in overrides {
            let mut entry = Entry {
                key: key.trim_start_matches('-').replace('-', "_"),
                value: Value::Null,
                origin: Origin::CommandLine,
            };
            let key = config.canonical(&entry)?;
            entry.value = config.parse_text(key, text).map_err(|expected| {
                wrong_value(key, &Value::from(text.as_str()), &expected, &entry.origin)
            })?;
            config.set(key, entry)?;
        }
        config.collect_notes();
        config.validate()?;
        Ok(config)
    }

    /// The table of keys, section by section.
    #[must_use]
    pub fn keys() -> Vec<Key> {
        let config = Self::default();
        let sections = config.sections();
        sections.into_iter().flat_map(Section::keys).collect()
    }

    /// How many words follow `key` on a command line, or `None` for a key that does not exist.
    #[must_use]
    pub fn arity(key: &str) -> Option<Arity> {
        let name = unaliased(key);
        let own = Self::keys().into_iter().find(|key| key.name == name);
        own.map(|key| key.arity)
            .or_else(|| foreign::find(name).map(ForeignKey::arity))
    }

    /// The value of `key` as it is saved, or `None` for a key that does not exist.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Value> {
        self.sections()
            .into_iter()
            .find_map(|section| section.get(key))
    }

    /// Where `key` was set, or `None` if it holds its default.
    #[must_use]
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.origins.get(key)
    }

    /// Every key with its value, and the keys without effect that were set.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut all = Map::new();
        for key in Self::keys() {
            all.insert(key.name.to_owned(), self.get(key.name).unwrap_or_default());
        }
        for (key, value) in &self.foreign {
            all.insert((*key).to_owned(), value.clone());
        }
        Value::Object(all)
    }

    /// [`TrainConfig::to_json`] as YAML, which loads as the same configuration.
    ///
    /// # Panics
    /// Never: a mapping of plain values always has a YAML form.
    #[must_use]
    #[expect(clippy::expect_used, reason = "invariant stated in the message")]
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(&self.to_json()).expect("plain values have a YAML form")
    }

    /// The keys whose values differ in `other`, in the order of the table.
    #[must_use]
    pub fn diff(&self, other: &Self) -> Vec<Difference> {
        let keys = Self::keys().into_iter();
        keys.filter_map(|key| {
            let old = self.get(key.name).unwrap_or_default();
            let new = other.get(key.name).unwrap_or_default();
            (old != new).then_some(Difference {
                key: key.name,
                old,
                new,
            })
        })
        .collect()
    }

    fn sections(&self) -> [&dyn Section; 7] {
        [
            &self.model,
            &self.data,
            &self.lora,
            &self.optimizer,
            &self.schedule,
            &self.output,
            &self.runtime,
        ]
    }

    fn sections_mut(&mut self) -> [&mut dyn Section; 7] {
        [
            &mut self.model,
            &mut self.data,
            &mut self.lora,
            &mut self.optimizer,
            &mut self.schedule,
            &mut self.output,
            &mut self.runtime,
        ]
    }

    /// The table's own name for an entry's key.
    fn canonical(&self, entry: &Entry) -> Result<&'static str> {
        let written = entry.key.as_str();
        if written == adapters::KEY {
            let message = format!(
                "trains several, and this command takes a configuration of one adapter; leave the list out ({})",
                entry.origin
            );
            return Err(Error::config(written, message));
        }
        let name = unaliased(written);
        let keys = Self::keys();
        if let Some(key) = keys.iter().find(|key| key.name == name) {
            return Ok(key.name);
        }
        if let Some(foreign) = foreign::find(name) {
            return Ok(foreign.name);
        }
        // The keys with a field come last: they win a draw.
        let compatible = foreign::FOREIGN_KEYS.iter().map(|key| key.name);
        let hint = did_you_mean(written, compatible.chain(keys.iter().map(|key| key.name)));
        let message = format!("unknown key ({}){hint}", entry.origin);
        Err(Error::config(written, message))
    }

    fn parse_text(&self, key: &str, text: &str) -> Result<Value, String> {
        self.sections()
            .into_iter()
            .find_map(|section| section.parse_text(key, text))
            .unwrap_or_else(|| value::yaml_scalar(text))
    }

    fn set(&mut self, key: &'static str, entry: Entry) -> Result<()> {
        let Entry { value, origin, .. } = entry;
        if let Some(foreign) = foreign::find(key) {
            foreign
                .check(&value)
                .map_err(|message| Error::config(key, format!("{message} ({origin})")))?;
            let kept = if is_secret(key) { HIDDEN.into() } else { value };
            self.foreign.insert(key, kept);
        } else if let Some(Err(expected)) = self
            .sections_mut()
            .into_iter()
            .find_map(|section| section.set(key, &value))
        {
            return Err(wrong_value(key, &value, &expected, &origin));
        }
        self.origins.insert(key, origin);
        Ok(())
    }

    fn collect_notes(&mut self) {
        let foreign = self.foreign.iter();
        self.notes = foreign
            .filter_map(|(key, value)| foreign::find(key)?.check(value).ok().flatten())
            .chain(validate::notes(self))
            .collect();
    }
}

/// The present name of a key.
fn unaliased(written: &str) -> &str {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == written);
    alias.map_or(written, |(_, key)| key)
}

fn wrong_value(key: &str, value: &Value, expected: &str, origin: &Origin) -> Error {
    let shown = shown(key, value);
    Error::config(key, format!("got {shown}, expected {expected} ({origin})"))
}

/// What stands for a secret in messages and saved configurations.
const HIDDEN: &str = "(hidden)";

fn is_secret(key: &str) -> bool {
    key == "hub_token"
}

/// A value for a message: short, and never a secret.
fn shown(key: &str, value: &Value) -> String {
    const LONGEST: usize = 80;
    if is_secret(key) {
        return HIDDEN.to_owned();
    }
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
