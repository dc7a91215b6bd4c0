//! The sandbox: the limits of a chat template, and what it may do besides [`python`].

use super::rewrite::CHECK_FILTER;
use super::strftime::strftime;
use super::tojson::tojson;
use super::{generation, python};
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, ErrorKind, State, UndefinedBehavior, Value};
use std::io;

/// Work a rendering may do: about one unit an instruction and one for 64 bytes of data, so this
/// is also a bound of 256 MiB on what a template can allocate.
const FUEL: u64 = 4_000_000;

/// Nested macro and block calls a template may make.
const MAX_RECURSION: usize = 100;

/// The environment of chat templates, with the date in seconds since 1970-01-01 UTC.
pub(super) fn environment(date: i64) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|e| Error::Template {
            message: e.to_string(),
        })?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    // So that an error says which value is undefined.
    environment.set_debug(true);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_RECURSION);
    python::install(&mut environment);
    environment.add_filter("tojson", tojson);
    environment.add_filter(CHECK_FILTER, assignable);
    set_date(&mut environment, date);
    Ok(environment)
}

/// Sets what `strftime_now` shows.
pub(super) fn set_date(environment: &mut Environment<'static>, date: i64) {
    environment.add_function("strftime_now", move |format: &str| strftime(format, date));
}

/// Refuses a value that holds a namespace: assigned to a namespace, it could hold itself.
///
/// The walk is charged for, so a template cannot grow a value without end either.
fn assignable(state: &State, value: Value) -> Result<Value, minijinja::Error> {
    let value = materialized(state, value)?;
    let mut waiting = vec![value.clone()];
    while let Some(next) = waiting.pop() {
        state.consume_fuel(1)?;
        let Some(object) = next.as_object() else {
            continue;
        };
        if object.type_name().contains("Namespace") {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                "a namespace cannot be assigned to an attribute of a namespace",
            ));
        }
        if let Some(items) = python::held_items(&next) {
            state.consume_fuel(items.len() as u64)?;
            waiting.extend(items);
        } else if next.kind() == ValueKind::Map {
            for key in next.try_iter()? {
                waiting.push(next.get_item(&key)?);
            }
        } else if next.len().is_some() && next.try_iter().is_ok() {
            waiting.extend(next.try_iter()?);
        }
    }
    Ok(value)
}

/// A lazy sequence or mapping as a plain one: chained over many turns of a loop, lazy values would
/// hide how deep they are, and each use would walk all of them.
fn materialized(state: &State, value: Value) -> Result<Value, minijinja::Error> {
    let name = value.as_object().map_or("", |object| object.type_name());
    let lazy = ["Merge", "Iter", "Slice", "Closure", "closure"];
    let lazy = lazy.iter().any(|part| name.contains(part)) || value.kind() == ValueKind::Iterable;
    if !lazy || python::is_plain_iterable(&value) {
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        items.push(item);
    }
    if value.kind() != ValueKind::Map {
        return Ok(items.into());
    }
    let pairs: Result<Vec<(Value, Value)>, minijinja::Error> = items
        .into_iter()
        .map(|key| Ok((key.clone(), value.get_item(&key)?)))
        .collect();
    Ok(Value::from_pairs(pairs?))
}

/// A JSON value for templates. With `reserved`, text that holds a generation marker is refused.
pub(super) fn json_to_value(json: &serde_json::Value, reserved: bool) -> Result<Value, String> {
    Ok(match json {
        serde_json::Value::Null => ().into(),
        serde_json::Value::Bool(value) => (*value).into(),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => value.into(),
            (None, Some(value)) => value.into(),
            (None, None) => number.as_f64().unwrap_or(f64::NAN).into(),
        },
        serde_json::Value::String(text) => {
            if reserved && text.contains([generation::BEGIN, generation::END]) {
                return Err(
                    "a message holds one of the Unicode noncharacters U+FDD0 and U+FDD1, which \
                     mark the assistant's text; remove them from the data"
                        .into(),
                );
            }
            text.as_str().into()
        }
        serde_json::Value::Array(items) => items
            .iter()
            .map(|item| json_to_value(item, reserved))
            .collect::<Result<Vec<Value>, String>>()?
            .into(),
        serde_json::Value::Object(fields) => Value::from_pairs(
            fields
                .iter()
                .map(|(name, value)| Ok((name.as_str(), json_to_value(value, reserved)?)))
                .collect::<Result<Vec<(&str, Value)>, String>>()?,
        ),
    })
}

/// A template error in one line: what, why, where.
pub(super) fn explain(error: &minijinja::Error) -> String {
    let mut message: String = match error.kind() {
        ErrorKind::OutOfFuel => {
            "the template works for too long; it may loop without end".to_owned()
        }
        ErrorKind::TemplateNotFound => {
            "include, import and extends are not available to chat templates".to_owned()
        }
        kind => match error.detail() {
            Some(detail) => detail.to_owned(),
            None => kind.to_string(),
        },
    };
    shorten(&mut message);
    if let Some(line) = error.line() {
        message.push_str(&format!(" (line {line} of the template)"));
    }
    message
}

/// Cuts a message that quotes what may be long.
pub(super) fn shorten(message: &mut String) {
    if let Some((end, _)) = message.char_indices().nth(400) {
        message.truncate(end);
        message.push_str("...");
    }
}

/// Output that refuses to grow beyond a limit.
pub(super) struct CappedOutput {
    bytes: Vec<u8>,
    limit: usize,
}

impl CappedOutput {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
        }
    }

    pub(super) fn into_string(self) -> Result<String, String> {
        String::from_utf8(self.bytes).map_err(|e| e.to_string())
    }
}

impl io::Write for CappedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other(format!(
                "the template wrote more than {} bytes",
                self.limit
            )));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
