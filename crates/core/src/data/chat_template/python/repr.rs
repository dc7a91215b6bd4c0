//! `str` and `repr` of values.

use super::objects::{self, Generator};
use super::{Result, error, type_name};
use minijinja::Value;
use minijinja::value::ValueKind;
use std::fmt::Write;

/// Python's own limit is near this.
pub(super) const MAX_DEPTH: usize = 300;

/// `str(value)`; an undefined value is nothing.
pub(in super::super) fn python_str(value: &Value) -> Result<String> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        _ => python_repr(value),
    }
}

/// `repr(value)`.
pub(super) fn python_repr(value: &Value) -> Result<String> {
    let mut out = String::new();
    write_repr(&mut out, value, 0)?;
    Ok(out)
}

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(error(format!(
            "a value nested deeper than {MAX_DEPTH} cannot be printed"
        )));
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number if value.is_integer() => drop(write!(out, "{value}")),
        ValueKind::Number => {
            out.push_str(&python_float(
                f64::try_from(value.clone()).unwrap_or(f64::NAN),
            ));
        }
        ValueKind::String => {
            let text = string_repr(value.as_str().unwrap_or_default());
            match value.is_safe() {
                true => drop(write!(out, "Markup({text})")),
                false => out.push_str(&text),
            }
        }
        ValueKind::Map => write_map(out, value, depth)?,
        ValueKind::Seq | ValueKind::Iterable => write_sequence(out, value, depth)?,
        _ => return Err(no_text(value)),
    }
    Ok(())
}

fn no_text(value: &Value) -> minijinja::Error {
    error(format!(
        "{} has no text of its own, only an address in memory",
        objects::describe(value)
    ))
}

fn write_map(out: &mut String, value: &Value, depth: usize) -> Result<()> {
    let name = value.as_object().map_or("", |object| object.type_name());
    if name.contains("Namespace") || name.contains("Loop") || name.contains("Macro") {
        return Err(no_text(value));
    }
    out.push('{');
    for (i, key) in value.try_iter()?.enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        write_repr(out, &key, depth + 1)?;
        out.push_str(": ");
        write_repr(out, &value.get_item(&key)?, depth + 1)?;
    }
    out.push('}');
    Ok(())
}

fn write_sequence(out: &mut String, value: &Value, depth: usize) -> Result<()> {
    if value.downcast_object_ref::<Generator>().is_some() {
        return Err(error(format!(
            "a {} has no text of its own, only an address in memory: add `| list`",
            type_name(value)
        )));
    }
    if let Some(text) = objects::range_repr(value) {
        out.push_str(&text);
        return Ok(());
    }
    let view = objects::view_name(value);
    let (open, close) = if value.is_tuple() || objects::is_group(value) {
        ('(', ')')
    } else {
        ('[', ']')
    };
    if let Some(name) = view {
        let _ = write!(out, "{name}(");
    }
    out.push(open);
    let mut count = 0;
    for item in value.try_iter()? {
        if count > 0 {
            out.push_str(", ");
        }
        write_repr(out, &item, depth + 1)?;
        count += 1;
    }
    if open == '(' && count == 1 {
        out.push(',');
    }
    out.push(close);
    if view.is_some() {
        out.push(')');
    }
    Ok(())
}

/// A float as Python's `repr` writes it: shortest digits, an exponent from 1e16 and below 1e-4.
pub(in super::super) fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(rest) => ('-', rest),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = value.to_string();
    if text.contains('.') {
        text
    } else {
        text + ".0"
    }
}

/// A string in quotes, with escapes for what cannot be seen.
pub(super) fn string_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c => escape(&mut out, c),
        }
    }
    out.push(quote);
    out
}

fn escape(out: &mut String, c: char) {
    let code = u32::from(c);
    let _ = match code {
        0..=0xff => write!(out, "\\x{code:02x}"),
        0x100..=0xffff => write!(out, "\\u{code:04x}"),
        _ => write!(out, "\\U{code:08x}"),
    };
}

/// `ascii(value)`: the `repr`, with escapes beyond ASCII too.
pub(super) fn python_ascii(value: &Value) -> Result<String> {
    let mut out = String::new();
    for c in python_repr(value)?.chars() {
        match c.is_ascii() {
            true => out.push(c),
            false => escape(&mut out, c),
        }
    }
    Ok(out)
}

/// Whether a character is shown as it is: not a control, format, private, unassigned or (but for the
/// space) separator character.
pub(super) fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return (' '..='~').contains(&c);
    }
    // The escapes of a string leave marks of a letter alone; those of a lone character do not.
    let mut text = String::from("x");
    text.push(c);
    text.escape_debug().nth(1) == Some(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (value, expected) in [
            (1.5, "1.5"),
            (100.0, "100.0"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e22, "1.25e+22"),
            (0.0001, "0.0001"),
            (0.000_012, "1.2e-05"),
            (1e-120, "1e-120"),
        ] {
            assert_eq!(python_float(value), expected);
        }
    }
}
