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
        Error::config(
            place.to_string(),
            format!(
                "not a mapping of keys to values: {}",
                error.without_snippet()
            ),
        )
    })?;
    let entries = parsed.unwrap_or_default().into_iter();
    Ok(entries
        .map(|(key, spanned)| Entry {
            key,
            origin: Origin::file(name, Some(spanned.referenced.line())),
            value: spanned.value,
        })
        .collect())
}
