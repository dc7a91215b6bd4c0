//! Reading a table of arguments by name, strictly: `lr_scheduler_kwargs`, `optim_args`.

use crate::config::word_as_bool;
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;

/// The arguments of one schedule or optimizer; remembers which names it was asked for.
pub(crate) struct Kwargs<'a> {
    /// The key of the configuration that holds them.
    table: &'static str,
    /// The key that chose whose they are, and its value.
    owner: [&'a str; 2],
    values: &'a BTreeMap<String, Value>,
    known: Vec<&'static str>,
}

impl<'a> Kwargs<'a> {
    pub(crate) fn new(
        table: &'static str,
        owner: [&'a str; 2],
        values: &'a BTreeMap<String, Value>,
    ) -> Self {
        Self {
            table,
            owner,
            values,
            known: Vec::new(),
        }
    }

    pub(crate) fn error(&self, key: &str, message: &str) -> Error {
        Error::config(
            format!("{}.{key}", self.table),
            format!("{message} ({})", self.owner.join(" ")),
        )
    }

    fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.push(key);
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn parsed<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&Value) -> Option<T>,
        expected: &str,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.error(key, &format!("{value} is not {expected}"))),
        }
    }

    fn checked_number(
        &mut self,
        key: &'static str,
        holds: impl Fn(f64) -> bool,
        expected: &str,
    ) -> Result<Option<f64>> {
        let read = |value: &Value| number(value).filter(|number| holds(*number));
        self.parsed(key, read, expected)
    }

    pub(crate) fn optional_number(&mut self, key: &'static str) -> Result<Option<f64>> {
        self.checked_number(key, |n| n >= 0.0, "a finite number of at least 0")
    }

    pub(crate) fn number(&mut self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    /// A number above 0.
    pub(crate) fn positive(&mut self, key: &'static str, default: f64) -> Result<f64> {
        let value = self.checked_number(key, |n| n > 0.0, "a finite number above 0")?;
        Ok(value.unwrap_or(default))
    }

    /// A number of at most 0.
    pub(crate) fn negative(&mut self, key: &'static str, default: f64) -> Result<f64> {
        let value = self.checked_number(key, |n| n <= 0.0, "a finite number of at most 0")?;
        Ok(value.unwrap_or(default))
    }

    /// A number from 0 to below 1.
    pub(crate) fn optional_share(&mut self, key: &'static str) -> Result<Option<f64>> {
        let unit = 0.0..1.0;
        self.checked_number(key, |n| unit.contains(&n), "a number from 0 to below 1")
    }

    pub(crate) fn share(&mut self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.optional_share(key)?.unwrap_or(default))
    }

    /// A whole number of at least 1.
    pub(crate) fn count(&mut self, key: &'static str) -> Result<Option<u64>> {
        let whole = |n: f64| n >= 1.0 && n.fract() == 0.0 && n <= MOST_COUNT;
        let count = self.checked_number(key, whole, "a whole number of at least 1")?;
        Ok(count.map(|n| n as u64))
    }

    /// true or false, as a word too.
    pub(crate) fn flag(&mut self, key: &'static str, default: bool) -> Result<bool> {
        let read = |value: &Value| match value {
            Value::Bool(flag) => Some(*flag),
            Value::String(text) => match text.trim() {
                "1" => Some(true),
                "0" => Some(false),
                word => word_as_bool(word),
            },
            _ => None,
        };
        Ok(self.parsed(key, read, "true or false")?.unwrap_or(default))
    }

    pub(crate) fn choice(
        &mut self,
        key: &'static str,
        choices: &[&'static str],
    ) -> Result<Option<&'static str>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let text = value.as_str().unwrap_or_default();
        match choices.iter().find(|choice| **choice == text) {
            Some(choice) => Ok(Some(choice)),
            None => Err(self.error(
                key,
                &format!(
                    "{value} is not one of {}{}",
                    choices.join(", "),
                    did_you_mean(text, choices.iter().copied())
                ),
            )),
        }
    }

    /// Refuses any kwarg nobody asked for.
    pub(crate) fn finish(self) -> Result<()> {
        let unknown = self
            .values
            .keys()
            .find(|key| !self.known.contains(&key.as_str()));
        let Some(key) = unknown else {
            return Ok(());
        };
        let accepted = if self.known.is_empty() {
            format!("{} takes none", self.owner[1])
        } else {
            format!("expected one of {}", self.known.join(", "))
        };
        let hint = did_you_mean(key, self.known.iter().copied());
        Err(self.error(key, &format!("unknown kwarg; {accepted}{hint}")))
    }
}

/// The largest count an f64 holds exactly.
const MOST_COUNT: f64 = 9_007_199_254_740_992.0;

/// A finite number; YAML 1.1 readers take `1e-5` for a string, so configs in the wild hold quoted ones.
fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    };
    number.filter(|n: &f64| n.is_finite())
}
