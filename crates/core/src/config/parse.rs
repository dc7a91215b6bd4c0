//! YAML text to entries that know where they were written.

use super::Origin;
use crate::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_saphyr::{Options, Spanned};
use std::collections::BTreeMap;

/// Largest configuration file, in bytes.
pub(super) const MAX_BYTES: u64 = 1 << 20;

/// One key with its value and where it was written.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: Value,
    pub(super) origin: Origin,
}

/// Limits far above any real configuration, far below what hurts.
fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 50_000,
            max_aliases: 100,
            max_anchors: 100,
            max_depth: 32,
            max_nodes: 10_000,
            max_documents: 1,

        },
        with_snippet: false,
        // Only true and false are booleans; `no` and `on` stay words, and keys that expect a
        // boolean read them as one.
        strict_booleans: true,
        non_finite_float_policy: serde_saphyr::NonFiniteFloatPolicy::AsString,
    }
}

/// Parses one YAML document within the limits.
pub(super) fn yaml<T: DeserializeOwned>(text: &str) -> Result<T, serde_saphyr::Error> {
    serde_saphyr::from_str_with_options(text, options())
}

/// The entries of a YAML file called `name` in messages.
pub(super) fn entries(text: &str, name: &str) -> Result<Vec<Entry>> {
    let parsed: Option<BTreeMap<String, Spanned<Value>>> = yaml(text).map_err(|error| {
        let line = error.location().map(|location| location.line());
        let place = Origin::file(name, line);
        Error::config(place.to_string(), reason(&error))
    })?;
    Ok(placed(parsed.unwrap_or_default(), name))
}

fn placed(mapping: BTreeMap<String, Spanned<Value>>, name: &str) -> Vec<Entry> {
    let entries = mapping.into_iter();
    entries
        .map(|(key, spanned)| Entry {
            key,
            origin: Origin::file(name, Some(spanned.referenced.line())),
            value: spanned.value,
        })
        .collect()
}

/// The entries of each mapping of the list `adapters` of a YAML file that has one, at `origin`.
pub(super) fn adapters(text: &str, name: &str, origin: &Origin) -> Result<Vec<Vec<Entry>>> {
    #[derive(serde::Deserialize)]
    struct File {
        adapters: Vec<BTreeMap<String, Spanned<Value>>>,
    }
    let parsed: File = yaml(text).map_err(|error| {
        let line = error.location().map(|location| location.line());
        let place = line.map_or(origin.clone(), |line| Origin::file(name, Some(line)));
        let message = format!(
            "expected a list of mappings, such as `- {{name: first, lora_r: 8}}`; {} ({place})",
            reason(&error)
        );
        Error::config(super::adapters::KEY, message)
    })?;
    let adapters = parsed.adapters.into_iter();
    Ok(adapters.map(|adapter| placed(adapter, name)).collect())
}

/// Why a text is not a configuration, for someone who writes one.
fn reason(error: &serde_saphyr::Error) -> String {
    match error.without_snippet() {
        serde_saphyr::Error::DuplicateMappingKey { key, .. } => {
            format!(
                "key {} is set twice; keep one",
                key.as_deref().unwrap_or_default()
            )
        }
        serde_saphyr::Error::Budget { breach, .. } => {
            format!("too large, too deep or more than one document for a configuration: {breach:?}")
        }
        other => format!("not a mapping of keys to values: {other}"),
    }
}
