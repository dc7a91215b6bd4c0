//! Reading the object of an `adapter_config.json`, key by key.

use crate::fit::{GivenRank, require_rank};
use crate::target::{ExcludeModules, PatternMap, Patterns, TargetModules};
use crate::unknown_key;
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result, suggest};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::Path;

/// Where an object stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// In a file of PEFT's, which may be newer and have keys nobody here knows.
    File(&'a Path),
    /// The same, for a comparison with PEFT, faults included.
    FileAsPeft(&'a Path),
    /// Under this key of a training configuration, where an unknown key is a mistake.
    Config(&'static str),
}

/// An object whose keys are read one by one.
pub(crate) struct Keys<'a> {
    source: Source<'a>,
    object: &'a Map<String, Value>,
    known: BTreeSet<&'static str>,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(source: Source<'a>, object: &'a Map<String, Value>) -> Self {
        let known = BTreeSet::new();
        Self {
            source,
            object,
            known,
        }
    }

    /// The directory of the adapter, if the object is read from one.
    pub(crate) fn directory(&self) -> Option<&'a Path> {
        match self.source {
            Source::File(path) | Source::FileAsPeft(path) => path.parent(),
            Source::Config(_) => None,
        }
    }

    /// Whether a run asks for the method, and not a file that PEFT may have made.
    pub(crate) fn are_asked(&self) -> bool {
        matches!(self.source, Source::Config(_))
    }

    /// Whether PEFT's known faults are wanted too.
    pub(crate) fn as_peft(&self) -> bool {
        matches!(self.source, Source::FileAsPeft(_))
    }

    /// The value of `key`, `None` if absent or null.
    pub(crate) fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.insert(key);
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn error(&self, key: &str, message: impl Into<String>) -> Error {
        let message = message.into();
        match self.source {
            Source::File(path) | Source::FileAsPeft(path) => {
                Error::adapter(path, format!("`{key}` {message}"))
            }
            Source::Config(parent) => Error::config(format!("{parent}.{key}"), message),
        }
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        self.error(key, format!("is {value}, expected {expected}"))
    }

    pub(crate) fn integer(&mut self, key: &'static str, default: usize) -> Result<usize> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => self.as_integer(key, value),
        }
    }

    fn as_integer(&self, key: &str, value: &Value) -> Result<usize> {
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number.ok_or_else(|| self.wrong(key, value, "a whole number"))
    }

    /// A whole number of at least 1.
    pub(crate) fn positive(&mut self, key: &'static str, default: usize) -> Result<usize> {
        match self.integer(key, default)? {
            0 => Err(self.error(
                key,
                format!("is 0, expected at least 1; {default} is PEFT's default"),
            )),
            number => Ok(number),
        }
    }

    pub(crate) fn number(&mut self, key: &'static str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => self.as_number(key, value),
        }
    }

    fn as_number(&self, key: &str, value: &Value) -> Result<f64> {
        let number = value.as_f64().filter(|n| (*n as f32).is_finite());
        number.ok_or_else(|| self.wrong(key, value, "a number"))
    }

    /// The probability of a dropout: in `[0, 1)` where a run asks for it; a file may say 1 too, which does nothing where
    /// nothing is trained.
    pub(crate) fn probability(&mut self, key: &'static str) -> Result<f64> {
        let p = self.number(key, 0.0)?;
        match (self.are_asked(), p) {
            (true, 1.0) => Err(self.error(
                key,
                "is 1, which leaves everything out, and nothing would be trained; 0 and 0.05 are usual",
            )),
            (_, 0.0..=1.0) => Ok(p),
            _ => Err(self.error(
                key,
                format!("is {p}, expected a probability from 0 to 1; 0 and 0.05 are usual"),
            )),
        }
    }

    pub(crate) fn boolean(&mut self, key: &'static str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(value) => Err(self.wrong(key, value, "true or false")),
        }
    }

    pub(crate) fn text(&mut self, key: &'static str) -> Result<Option<String>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(value) => Err(self.wrong(key, value, "a string or null")),
        }
    }

    /// One of `choices`, the first by default.
    pub(crate) fn choice(
        &mut self,
        key: &'static str,
        choices: &[&'static str],
    ) -> Result<&'static str> {
        let Some(value) = self.get(key) else {
            return Ok(choices.first().copied().unwrap_or_default());
        };
        let text = value.as_str().unwrap_or_default();
        choices
            .iter()
            .copied()
            .find(|choice| *choice == text)
            .ok_or_else(|| {
                let near = suggest::did_you_mean(text, choices.iter().copied());
                self.wrong(key, value, &format!("one of {}{near}", choices.join(", ")))
            })
    }

    /// Refuses a feature that is on and not there: anything but null, false, 0, an empty list, object or
    /// text, or `"none"`.
    pub(crate) fn require_off(&mut self, key: &'static str) -> Result<()> {
        if self.get(key).is_none_or(unknown_key::is_off) {
            return Ok(());
        }
        let value = &self.object[key];
        Err(self.error(
            key,
            format!("is {value}: this feature of the method is not supported, and ignoring it would give a different model"),
        ))
    }

    /// Keys that say nothing about the arithmetic.
    pub(crate) fn ignore(&mut self, keys: &[&'static str]) {
        self.known.extend(keys);
    }

    fn names(&self, key: &str, value: &Value) -> Result<Vec<String>> {
        let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
        let names = items.iter().map(|item| item.as_str().map(str::to_owned));
        let names: Option<Vec<String>> = names.collect();
        names.ok_or_else(|| self.wrong(key, value, "a list of strings"))
    }

    pub(crate) fn target_modules(&mut self, key: &'static str) -> Result<Option<TargetModules>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(TargetModules::from_text(text))),
            Some(value @ Value::Array(_)) => Ok(Some(TargetModules::List(self.names(key, value)?))),
            Some(value) => Err(self.wrong(
                key,
                value,
                "a list of names, a regular expression, \"all-linear\" or null",
            )),
        }
    }

    pub(crate) fn exclude_modules(&mut self) -> Result<Option<ExcludeModules>> {
        let key = "exclude_modules";
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => Ok(Some(ExcludeModules::Regex(text.clone()))),
            Some(Value::Array(items)) if items.is_empty() => Ok(None),
            Some(value @ Value::Array(_)) => {
                Ok(Some(ExcludeModules::List(self.names(key, value)?)))
            }
            Some(value) => {
                Err(self.wrong(key, value, "a list of names, a regular expression or null"))
            }
        }
    }

    /// A string or a list of them.
    pub(crate) fn one_or_more(&mut self, key: &'static str) -> Result<Vec<String>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) if text.is_empty() => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text.clone()]),
            Some(value @ Value::Array(_)) => self.names(key, value),
            Some(value) => Err(self.wrong(key, value, "a string, a list of strings or null")),
        }
    }

    /// A number or a list of them.
    pub(crate) fn layers(&mut self) -> Result<Option<Vec<usize>>> {
        let key = "layers_to_transform";
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(items)) => {
                let layers = items.iter().map(|item| self.as_integer(key, item));
                Ok(Some(layers.collect::<Result<_>>()?))
            }
            Some(value) => Ok(Some(vec![self.as_integer(key, value)?])),
        }
    }

    /// A whole number, at least 1, with other values for some modules.
    pub(crate) fn patterned(
        &mut self,
        key: &'static str,
        default: usize,
        pattern_key: &'static str,
    ) -> Result<Patterned<usize>> {
        let default = self.positive(key, default)?;
        let pattern = self.pattern(pattern_key, Self::as_integer)?;
        if let Some((name, _)) = pattern.iter().find(|(_, value)| *value == 0) {
            return Err(self.error(
                pattern_key,
                format!("gives `{name}` 0, expected at least 1"),
            ));
        }
        Ok(Patterned {
            default,
            keys: [key, pattern_key],
            asked: self.are_asked(),
            pattern,
        })
    }

    /// A number with other values for some modules.
    pub(crate) fn patterned_number(
        &mut self,
        key: &'static str,
        default: f64,
        pattern_key: &'static str,
    ) -> Result<Patterned<f64>> {
        let default = self.number(key, default)?;
        let pattern = self.pattern(pattern_key, Self::as_number)?;
        Ok(Patterned {
            default,
            keys: [key, pattern_key],
            asked: self.are_asked(),
            pattern,
        })
    }

    fn pattern<T>(
        &mut self,
        key: &'static str,
        convert: impl Fn(&Self, &str, &Value) -> Result<T>,
    ) -> Result<PatternMap<T>> {
        match self.get(key) {
            None => Ok(PatternMap::new()),
            Some(Value::Object(entries)) => entries
                .iter()
                .map(|(name, value)| Ok((name.clone(), convert(self, key, value)?)))
                .collect(),
            Some(value) => Err(self.wrong(key, value, "an object from module names to numbers")),
        }
    }

    /// Says what is left: an error in a configuration; for a file, what [`unknown_key::judge`] says.
    pub(crate) fn finish(self) -> Result<()> {
        for (key, value) in self.object {
            if self.known.contains(key.as_str()) {
                continue;
            }
            match self.source {
                Source::File(path) | Source::FileAsPeft(path) => {
                    let known: Vec<&str> = self.known.iter().copied().collect();
                    unknown_key::judge(path, key, value, &known)?;
                }
                Source::Config(_) => {
                    let near = suggest::did_you_mean(key, self.known.iter().copied());
                    return Err(self.error(key, format!("is no key of this method{near}")));
                }
            }
        }
        Ok(())
    }
}

/// A value by module.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Patterned<T> {
    pub(crate) default: T,
    /// Of the default, and of the pattern.
    keys: [&'static str; 2],
    /// Whether a run asks for it.
    asked: bool,
    pub(crate) pattern: PatternMap<T>,
}

impl<T: Copy> Patterned<T> {
    /// The value for `module`.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub(crate) fn of(&self, module: &str) -> Result<T> {
        let patterns = Patterns::compile(self.keys[1], &self.pattern)?;
        Ok(patterns.value(module)?.unwrap_or(self.default))
    }

    /// Refuses a pattern that matches none of `modules`.
    pub(crate) fn require_used(&self, modules: &[&str]) -> Result<()> {
        Patterns::compile(self.keys[1], &self.pattern)?.require_all_used(modules)
    }
}

impl Patterned<usize> {
    /// Refuses a rank that a run asks for above both dimensions of a target, and a pattern that matches none.
    pub(crate) fn require_ranks(&self, targets: &[&Site]) -> Result<()> {
        let names: Vec<&str> = targets.iter().map(|site| site.name.as_str()).collect();
        self.require_used(&names)?;
        let given = |site: &Site| GivenRank::of(self.keys, self.default, &self.pattern, &site.name);
        let mut asked = targets.iter().filter(|_| self.asked);
        asked.try_for_each(|site| require_rank(site, given(site)?))
    }
}

impl<T: serde::Serialize> Patterned<T> {
    /// The pattern as PEFT writes it, its entries in their order.
    pub(crate) fn to_json(&self) -> Value {
        let entries = self
            .pattern
            .iter()
            .map(|(name, value)| (name.clone(), serde_json::json!(value)));
        Value::Object(entries.collect())
    }
}
