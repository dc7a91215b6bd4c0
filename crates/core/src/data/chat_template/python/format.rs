//! `text.format(...)`.
//!
//! A single number is formatted by the engine, which follows Python's specifications; what is around it
//! is not.

use super::repr::{python_ascii, python_repr, python_str};
use super::{Result, charge, error, is_method, type_name};
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{State, Value};

/// What the fields of `format` are filled with.
struct Fields<'a> {
    positional: &'a [Value],
    keywords: Option<Value>,
    next: usize,
}

/// `text.format(...)`.
pub(super) fn str_format(state: &State, text: &str, args: &[Value]) -> Result<String> {
    let (positional, keywords) = match args.split_last() {
        Some((last, rest)) if last.is_kwargs() => (rest, Some(last.clone())),
        _ => (args, None),
    };
    let keywords = match keywords {
        Some(value) => {
            let (keywords,): (Kwargs,) = from_args(std::slice::from_ref(&value))?;
            let pairs: Result<Vec<(String, Value)>> = keywords
                .args()
                .map(|name| Ok((name.to_owned(), keywords.peek(name)?)))
                .collect();
            Some(Value::from_pairs(pairs?))
        }
        None => None,
    };
    let mut fields = Fields {
        positional,
        keywords,
        next: 0,
    };
    fill(state, text, &mut fields, 2)
}

/// `text.format_map(mapping)`.
pub(super) fn format_map(state: &State, text: &str, mapping: &Value) -> Result<String> {
    let mut fields = Fields {
        positional: &[],
        keywords: Some(mapping.clone()),
        next: 0,
    };
    fill(state, text, &mut fields, 2)
}

fn fill(state: &State, text: &str, fields: &mut Fields, depth: usize) -> Result<String> {
    if depth == 0 {
        return Err(error("`format`: fields nested too deeply"));
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        if brace == "}" {
            return Err(error("`format`: a single `}`"));
        }
        let end = closing_brace(rest).ok_or_else(|| error("`format`: a `{` that is not closed"))?;
        out.push_str(&field(state, &rest[..end], fields, depth)?);
        charge(state, out.len())?;
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

fn closing_brace(text: &str) -> Option<usize> {
    let mut open = 0;
    for (i, c) in text.char_indices() {
        match c {
            '{' => open += 1,
            '}' if open == 0 => return Some(i),
            '}' => open -= 1,
            _ => {}
        }
    }
    None
}

/// A field: `name[!conversion][:specification]`.
fn field(state: &State, text: &str, fields: &mut Fields, depth: usize) -> Result<String> {
    let (head, specification) = text.split_once(':').unwrap_or((text, ""));
    let (name, conversion) = match head.split_once('!') {
        Some((name, conversion)) => (name, Some(conversion)),
        None => (head, None),
    };
    let value = lookup(name, fields)?;
    let value = match conversion {
        None => value,
        Some("r") => Value::from(python_repr(&value)?),
        Some("s") => Value::from(python_str(&value)?),
        Some("a") => Value::from(python_ascii(&value)?),
        Some(other) => {
            return Err(error(format!(
                "`format`: there is no conversion `!{other}`"
            )));
        }
    };
    let specification = match specification.contains('{') {
        true => fill(state, specification, fields, depth - 1)?,
        false => specification.to_owned(),
    };
    specified(state, &value, &specification)
}

fn lookup(name: &str, fields: &mut Fields) -> Result {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(end);
    let number = match first.is_empty() {
        true => {
            fields.next += 1;
            Some(fields.next - 1)
        }
        false => first.parse::<usize>().ok(),
    };
    let found = match number {
        Some(number) => fields.positional.get(number).cloned(),
        None => match &fields.keywords {
            Some(keywords) => Some(keywords.get_attr(first)?).filter(|v| !v.is_undefined()),
            None => None,
        },
    };
    let mut value =
        found.ok_or_else(|| error(format!("`format` is given nothing for `{{{first}}}`")))?;
    while !rest.is_empty() {
        if let Some(index) = rest.strip_prefix('[') {
            let (key, after) = index
                .split_once(']')
                .ok_or_else(|| error("`format`: a `[` that is not closed"))?;
            let key = key
                .parse::<usize>()
                .map_or_else(|_| Value::from(key), Value::from);
            value = value.get_item(&key)?;
            rest = after;
        } else {
            let name = rest.strip_prefix('.').unwrap_or(rest);
            let (name, after) = name.split_at(name.find(['.', '[']).unwrap_or(name.len()));
            value = attribute(&value, name)?;
            rest = after;
        }
    }
    Ok(value)
}

/// As Jinja's sandbox looks it up: an attribute, else an item.
fn attribute(value: &Value, name: &str) -> Result {
    if is_method(name) && !value.is_undefined() {
        return Err(error(format!(
            "`format`: `{name}` is a method, whose text depends on Python"
        )));
    }
    value.get_attr(name)
}

/// `format(value, specification)`.
fn specified(state: &State, value: &Value, specification: &str) -> Result<String> {
    if specification.is_empty() {
        return python_str(value);
    }
    for number in specification.split(|c: char| !c.is_ascii_digit()) {
        if !number.is_empty() {
            let size = number.parse::<u32>().unwrap_or(u32::MAX);
            charge(state, size as usize)?;
        }
    }
    if let Some(text) = value.as_str() {
        return specified_text(text, specification);
    }
    let value = &match value.kind() {
        ValueKind::Bool => Value::from(i64::from(value.is_true())),
        _ => value.clone(),
    };
    let formattable = matches!(value.kind(), ValueKind::Number);
    if !formattable || specification.contains(['{', '}']) {
        return Err(error(format!(
            "`format`: `{specification}` is no format of {}",
            type_name(value)
        )));
    }
    if let Some(rest) = specification.strip_suffix('%') {
        let precision = match rest.strip_prefix('.') {
            Some(digits) => digits.parse::<usize>().ok(),
            None if rest.is_empty() => Some(6),
            None => None,
        };
        let number = f64::try_from(value.clone()).ok();
        let (Some(precision), Some(number)) = (precision, number) else {
            return Err(error(format!(
                "`format`: `{specification}` is not supported"
            )));
        };
        return Ok(format!("{:.precision$}%", number * 100.0));
    }
    let template = format!("{{:{specification}}}");
    format(
        FormatStyle::StrFormat,
        &template,
        std::slice::from_ref(value),
    )
}

/// Text by `[[fill]align][width][.precision][s]`.
fn specified_text(text: &str, specification: &str) -> Result<String> {
    let wrong = || error(format!("`format`: `{specification}` is no format of str"));
    let chars: Vec<char> = specification.chars().collect();
    let (fill, align, rest) = match chars.as_slice() {
        [fill, align @ ('<' | '>' | '^'), rest @ ..] => (*fill, *align, rest),
        [align @ ('<' | '>' | '^'), rest @ ..] => (' ', *align, rest),
        rest => (' ', '<', rest),
    };
    let rest: String = rest.iter().collect();
    let rest = rest.strip_suffix('s').unwrap_or(&rest);
    let (width, precision) = match rest.split_once('.') {
        Some((width, precision)) => (
            width,
            Some(precision.parse::<usize>().map_err(|_| wrong())?),
        ),
        None => (rest, None),
    };
    let width = match width {
        "" => 0,
        width if width.starts_with('0') => return Err(wrong()),
        width => width.parse::<usize>().map_err(|_| wrong())?,
    };
    let text: String = text.chars().take(precision.unwrap_or(usize::MAX)).collect();
    let missing = width.saturating_sub(text.chars().count());
    let before = match align {
        '<' => 0,
        '>' => missing,
        _ => missing / 2,
    };
    let fill = |count: usize| String::from(fill).repeat(count);
    Ok(fill(before) + &text + &fill(missing - before))
}
