//! What a key can hold: from YAML and from the command line, to YAML, as JSON schema.

use crate::suggest::did_you_mean;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// How many words follow a key on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// None, which means true, or one.
    Switch,
    /// One.
    Single,
    /// One or more: the entries of a list.
    List,
}

/// A type of configuration value. The one place that knows how it is written and read.
pub trait KeyValue: Sized {
    /// Words of a value on a command line.
    const ARITY: Arity = Arity::Single;

    /// JSON schema of a value.
    fn schema() -> Value;

    /// Reads a parsed YAML value.
    ///
    /// # Errors
    /// What was expected instead, as the end of a sentence.
    fn from_value(value: &Value) -> Result<Self, String>;

    /// The value as it is saved.
    fn to_value(&self) -> Value;

    /// Reads the text of a command line argument into the value YAML would have given.
    ///
    /// # Errors
    /// What was expected instead.
    fn parse_text(text: &str) -> Result<Value, String> {
        yaml_scalar(text)
    }
}

/// A YAML scalar or flow collection.
pub(super) fn yaml_scalar(text: &str) -> Result<Value, String> {
    super::parse::yaml(text).map_err(|error| format!("a YAML value ({})", error.without_snippet()))
}

/// `text` without its quotes if it is a quoted YAML scalar, else as it stands.
fn plain_text(text: &str) -> String {
    if text.starts_with(['"', '\''])
        && let Ok(Value::String(unquoted)) = yaml_scalar(text)
    {
        return unquoted;
    }
    text.to_owned()
}

/// The words YAML 1.1 readers take for booleans, quoted ones too, as Transformers' parser does.
pub(crate) fn word_as_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => Some(true),
        "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

impl KeyValue for bool {
    const ARITY: Arity = Arity::Switch;

    fn schema() -> Value {
        json!({"type": "boolean"})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Bool(value) => Ok(*value),
            Value::String(text) => word_as_bool(text).ok_or_else(|| "true or false".to_owned()),
            _ => Err("true or false".to_owned()),
        }
    }

    fn to_value(&self) -> Value {
        json!(self)
    }
}

/// Numbers, also where YAML 1.1 readers made strings of them (`2e-5`).
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::String(text) => text.trim().parse().ok().filter(|n: &f64| n.is_finite()),
        other => other.as_f64(),
    }
}

impl KeyValue for f64 {
    fn schema() -> Value {
        json!({"type": "number"})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        number(value).ok_or_else(|| "a finite number".to_owned())
    }

    fn to_value(&self) -> Value {
        json!(self)
    }
}

/// Largest integer an f64 holds exactly.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

impl KeyValue for i64 {
    fn schema() -> Value {
        json!({"type": "integer"})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        if let Some(value) = value.as_i64() {
            return Ok(value);
        }
        number(value)
            .filter(|n| n.fract() == 0.0 && n.abs() <= MAX_EXACT)
            .map(|n| n as Self)
            .ok_or_else(|| "a whole number".to_owned())
    }

    fn to_value(&self) -> Value {
        json!(self)
    }
}

impl KeyValue for u64 {
    fn schema() -> Value {
        json!({"type": "integer", "minimum": 0})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        if let Some(value) = value.as_u64() {
            return Ok(value);
        }
        i64::from_value(value)
            .ok()
            .and_then(|value| Self::try_from(value).ok())
            .ok_or_else(|| "a whole number of at least 0".to_owned())
    }

    fn to_value(&self) -> Value {
        json!(self)
    }
}

impl KeyValue for usize {
    fn schema() -> Value {
        u64::schema()
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        let value = u64::from_value(value)?;
        Self::try_from(value).map_err(|_| "a whole number that fits in memory".to_owned())
    }

    fn to_value(&self) -> Value {
        json!(self)
    }
}

impl KeyValue for String {
    fn schema() -> Value {
        json!({"type": "string"})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(text.clone()),
            // A name such as `run_name: 42` means its digits.
            Value::Number(number) => Ok(number.to_string()),
            _ => Err("a string".to_owned()),
        }
    }

    fn to_value(&self) -> Value {
        json!(self)
    }

    fn parse_text(text: &str) -> Result<Value, String> {
        Ok(Value::String(plain_text(text)))
    }
}

impl<T: KeyValue> KeyValue for Option<T> {
    const ARITY: Arity = T::ARITY;

    fn schema() -> Value {
        json!({"anyOf": [T::schema(), {"type": "null"}]})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(None),
            value => T::from_value(value)
                .map(Some)
                .map_err(|expected| format!("{expected}, or null")),
        }
    }

    fn to_value(&self) -> Value {
        self.as_ref().map_or(Value::Null, KeyValue::to_value)
    }

    fn parse_text(text: &str) -> Result<Value, String> {
        if is_null(text) {
            return Ok(Value::Null);
        }
        T::parse_text(text)
    }
}

/// Whether the text of an argument unsets a key.
fn is_null(text: &str) -> bool {
    ["", "~", "null", "None"].contains(&text.trim())
}

/// The words of a command line list: a YAML flow list, or words between commas or blanks.
fn words(text: &str) -> Result<Vec<Value>, String> {
    if text.trim_start().starts_with('[') {
        return match yaml_scalar(text)? {
            Value::Array(items) => Ok(items),
            _ => Err("a list such as [a, b]".to_owned()),
        };
    }
    if text.starts_with(['"', '\'']) {
        return Ok(vec![Value::String(plain_text(text))]);
    }
    Ok(text
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .map(|word| Value::String(word.to_owned()))
        .collect())
}

/// A single value stands for a list of one, as on Transformers' command line.
impl<T: KeyValue> KeyValue for Vec<T> {
    const ARITY: Arity = Arity::List;

    fn schema() -> Value {
        json!({"anyOf": [{"type": "array", "items": T::schema()}, T::schema()]})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(Self::new()),
            Value::Array(items) => items.iter().map(T::from_value).collect(),
            single => T::from_value(single).map(|item| vec![item]),
        }
        .map_err(|expected| format!("a list, each entry {expected}"))
    }

    fn to_value(&self) -> Value {
        self.iter().map(KeyValue::to_value).collect()
    }

    fn parse_text(text: &str) -> Result<Value, String> {
        if is_null(text) {
            return Ok(Value::Null);
        }
        words(text).map(Value::Array)
    }
}

/// A range `[start, end)`.
impl KeyValue for [usize; 2] {
    fn schema() -> Value {
        json!({"type": "array", "items": usize::schema(), "minItems": 2, "maxItems": 2})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        let number = |value| usize::from_value(value).ok();
        let pair = match value.as_array().map(Vec::as_slice) {
            Some([start, end]) => number(start).zip(number(end)),
            _ => None,
        };
        pair.map(|(start, end)| [start, end])
            .ok_or_else(|| "a range [start, end] of whole numbers of at least 0".to_owned())
    }

    fn to_value(&self) -> Value {
        json!(self)
    }
}

/// Named values; in YAML also as a JSON string, which is how Transformers takes them on the
/// command line.
impl<T: KeyValue> KeyValue for BTreeMap<String, T> {
    fn schema() -> Value {
        json!({"type": "object", "additionalProperties": T::schema()})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(Self::new()),
            Value::Object(entries) => entries
                .iter()
                .map(|(name, value)| Ok((name.clone(), T::from_value(value)?)))
                .collect(),
            Value::String(text) if text.trim_start().starts_with('{') => {
                Self::from_value(&yaml_scalar(text)?)
            }
            _ => Err("named values such as {name: value}".to_owned()),
        }
    }

    fn to_value(&self) -> Value {
        let entries = self.iter();
        Value::Object(entries.map(|(k, v)| (k.clone(), v.to_value())).collect())
    }
}

/// Named values in the order they are written in, which decides between patterns that both match.
#[derive(Clone, Debug, PartialEq)]
pub struct Ordered<T>(pub Vec<(String, T)>);

impl<T> Ordered<T> {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The values without their names.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, value)| value)
    }
}

impl<T: KeyValue> KeyValue for Ordered<T> {
    fn schema() -> Value {
        BTreeMap::<String, T>::schema()
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Object(entries) => {
                let entries = entries.iter();
                let entries = entries.map(|(name, v)| Ok((name.clone(), T::from_value(v)?)));
                entries.collect::<Result<_, String>>().map(Self)
            }
            Value::String(text) if text.trim_start().starts_with('{') => {
                Self::from_value(&yaml_scalar(text)?)
            }
            // Without entries there is no order.
            other => BTreeMap::<String, T>::from_value(other)
                .map(|entries| Self(entries.into_iter().collect())),
        }
    }

    fn to_value(&self) -> Value {
        let entries = self.0.iter();
        Value::Object(entries.map(|(k, v)| (k.clone(), v.to_value())).collect())
    }
}

impl KeyValue for Value {
    fn schema() -> Value {
        json!({})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        Ok(value.clone())
    }

    fn to_value(&self) -> Value {
        self.clone()
    }
}

/// One string (a pattern) or a list of names, which PEFT treats differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Names {
    /// `all-linear`, or a regular expression for the whole module path.
    Pattern(String),
    /// Names, each a whole module path or its last parts.
    List(Vec<String>),
}

/// The word that stands for every linear layer but the output head, in any case.
pub const ALL_LINEAR: &str = "all-linear";

impl KeyValue for Names {
    const ARITY: Arity = Arity::List;

    fn schema() -> Value {
        json!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        let expected = || "a string or a list of strings".to_owned();
        match value {
            Value::String(text) => Ok(Self::Pattern(text.clone())),
            Value::Array(items) => {
                let names: Option<Vec<_>> = items.iter().map(Value::as_str).collect();
                match names.ok_or_else(expected)?.as_slice() {
                    // TRL's command line makes a list of every argument, this word too.
                    [word] if word.eq_ignore_ascii_case(ALL_LINEAR) => {
                        Ok(Self::Pattern((*word).to_owned()))
                    }
                    names => Ok(Self::List(names.iter().map(ToString::to_string).collect())),
                }
            }
            _ => Err(expected()),
        }
    }

    fn to_value(&self) -> Value {
        match self {
            Self::Pattern(pattern) => json!(pattern),
            Self::List(names) => json!(names),
        }
    }

    /// A regular expression is a pattern, other words are names. In brackets it is a list, as in a file.
    fn parse_text(text: &str) -> Result<Value, String> {
        let is_list =
            text.trim_start().starts_with('[') && matches!(yaml_scalar(text), Ok(Value::Array(_)));
        if !is_list && text.contains(is_metacharacter) && !has_separator(text) {
            return Ok(Value::String(plain_text(text)));
        }
        words(text).map(Value::Array)
    }
}

impl Names {
    /// What a text on a command line means.
    ///
    /// # Errors
    /// What was expected instead.
    pub fn from_text(text: &str) -> Result<Self, String> {
        Self::from_value(&Self::parse_text(text)?)
    }
}

/// Characters that stand in regular expressions and never in module paths. Dots stand in both.
#[must_use]
pub fn is_metacharacter(c: char) -> bool {
    r"*+?[](){}|^$\".contains(c)
}

/// Whether a comma of `text` stands between entries of a list, and not inside of a group such as `{1,2}`.
fn has_separator(text: &str) -> bool {
    let mut depth = 0;
    text.chars().any(|c| {
        depth += match c {
            '(' | '[' | '{' => 1,
            ')' | ']' | '}' => -1,
            _ => 0,
        };
        c == ',' && depth == 0
    })
}

/// Reads one of a fixed set of names.
///
/// # Errors
/// The names there are, the nearest, and `note`.
pub(super) fn choice<T: Copy>(
    value: &Value,
    choices: &[(&'static str, T)],
    note: &str,
) -> Result<T, String> {
    let text = match value {
        Value::String(text) => text.as_str(),
        // YAML 1.1 readers make false of a bare `no`, and JSON made by them holds that.
        Value::Bool(false) => "no",
        _ => "",
    };
    let named = choices.iter().find(|(name, _)| *name == text);
    named.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let hint = did_you_mean(text, names.iter().copied());
        format!("one of {}{hint}{note}", names.join(", "))
    })
}

/// Declares an enum whose values are words in the configuration file, with what else there is to say of a
/// wrong one.
macro_rules! choices {
    (
        $(#[doc = $doc:literal])+
        $name:ident { $( $(#[doc = $variant_doc:literal])+ $variant:ident = $word:literal ),+ $(,)? }
        $(else $note:literal)?
    ) => {
        $(#[doc = $doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $( $(#[doc = $variant_doc])+ $variant, )+
        }

        impl $name {
            /// The word for it in a configuration file.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $word, )+ }
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                <Self as $crate::config::value::KeyValue>::from_value(&serde_json::json!(text))
            }
        }

        impl $crate::config::value::KeyValue for $name {
            fn schema() -> serde_json::Value {
                serde_json::json!({"enum": [$($word),+]})
            }

            fn from_value(value: &serde_json::Value) -> Result<Self, String> {
                let note = concat!("", $($note)?);
                $crate::config::value::choice(value, &[$(($word, Self::$variant)),+], note)
            }

            fn to_value(&self) -> serde_json::Value {
                serde_json::json!(self.as_str())
            }

            fn parse_text(text: &str) -> Result<serde_json::Value, String> {
                <String as $crate::config::value::KeyValue>::parse_text(text)
            }
        }
    };
}
pub(super) use choices;
