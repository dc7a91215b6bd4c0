//! Reading `lr_scheduler_kwargs` by name, strictly.

use crate::suggest::did_you_mean;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;

/// The kwargs of one schedule; remembers which names it was asked for.
pub(super) struct Kwargs<'a> {
    schedule: &'a str,
    values: &'a BTreeMap<String, Value>,
    known: Vec<&'static str>,
}

impl<'a> Kwargs<'a> {
    pub(super) fn new(schedule: &'a str, values: &'a BTreeMap<String, Value>) -> Self {
        Self {
            schedule,
            values,
            known: Vec::new(),
        }
    }

    pub(super) fn error(&self, key: &str, message: &str) -> Error {
        Error::config(
            format!("lr_scheduler_kwargs.{key}"),
            format!("{message} (lr_scheduler_type {})", self.schedule),
        )
    }

    fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.push(key);
        self.values.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn optional_number(&mut self, key: &'static str) -> Result<Option<f64>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        // YAML 1.1 readers take `1e-5` for a string, so configs in the wild hold quoted numbers.
        let number = match value {
            Value::String(text) => text.parse().ok(),
            other => other.as_f64(),
        };
        match number.filter(|n: &f64| n.is_finite() && *n >= 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(
                key,
                &format!("{value} is not a finite number of at least 0"),
            )),
        }
    }

    pub(super) fn number(&mut self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    pub(super) fn choice(
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
    pub(super) fn finish(self) -> Result<()> {
        let unknown = self
            .values
            .keys()
            .find(|key| !self.known.contains(&key.as_str()));
        let Some(key) = unknown else {
            return Ok(());
        };
        let accepted = if self.known.is_empty() {
            "this schedule takes none".to_owned()
        } else {
            format!("expected one of {}", self.known.join(", "))
        };
        let hint = did_you_mean(key, self.known.iter().copied());
        Err(self.error(key, &format!("unknown kwarg; {accepted}{hint}")))
    }
}
