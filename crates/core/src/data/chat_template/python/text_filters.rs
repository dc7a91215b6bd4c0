//! Jinja's filters of text.

use super::printf::printf;
use super::repr::python_str;
use super::strings::{capitalized, padded, replace as replaced, stripped};
use super::{
    Filter, Result, add_filters, bind, charge, error, flag_or, integer_or, required, text_or,
};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, State, Value};
use std::borrow::Cow;
use std::fmt::Write;

const FILTERS: &[(&str, Filter)] = &[
    ("capitalize", |_, value, _| {
        Ok(Value::from(capitalized(&python_str(value)?)))
    }),
    ("center", |state, value, args| {
        let [width] = bind("center", ["width"], args)?;
        let width = integer_or("center", &width, 80)?;
        padded(state, &python_str(value)?, width, " ", "center").map(Value::from)
    }),
    ("e", escape),
    ("escape", escape),
    ("filesizeformat", file_size),
    ("forceescape", |_, value, _| {
        Ok(Value::from_safe_string(escaped(&python_str(value)?)))
    }),
    ("format", format),
    ("indent", indent),
    ("lower", |_, value, _| {
        Ok(Value::from(python_str(value)?.to_lowercase()))
    }),
    ("replace", |state, value, args| {
        let [old, new, count] = bind("replace", ["old", "new", "count"], args)?;
        let old = Value::from(python_str(&required("replace", "old", old)?)?);
        let new = Value::from(python_str(&required("replace", "new", new)?)?);
        replaced(state, &python_str(value)?, &old, &new, count).map(Value::from)
    }),
    ("safe", |_, value, _| {
        Ok(Value::from_safe_string(python_str(value)?))
    }),
    ("title", |_, value, _| {
        let text = python_str(value)?;
        Ok(Value::from(minijinja::filters::title(Cow::Owned(text))))
    }),
    ("trim", |_, value, args| {
        let [chars] = bind("trim", ["chars"], args)?;
        let chars = chars.filter(|chars| !chars.is_none());
        let set = match &chars {
            Some(_) => Some(text_or("trim", &chars, "")?),
            None => None,
        };
        Ok(Value::from(stripped(&python_str(value)?, set, "strip")))
    }),
    ("truncate", truncate),
    ("upper", |_, value, _| {
        Ok(Value::from(python_str(value)?.to_uppercase()))
    }),
    ("urlencode", url_encode),
    ("wordcount", |_, value, _| {
        let text = python_str(value)?;
        let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        Ok(Value::from(words.filter(|word| !word.is_empty()).count()))
    }),
];

pub(super) fn install(environment: &mut Environment<'static>) {
    add_filters(environment, FILTERS);
}

/// Text for HTML.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

fn escape(_: &mut State, value: &Value, _: &[Value]) -> Result {
    match value.is_safe() {
        true => Ok(value.clone()),
        false => Ok(Value::from_safe_string(escaped(&python_str(value)?))),
    }
}

fn format(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let values = match args.split_last() {
        Some((keywords, [])) if keywords.is_kwargs() => {
            let names: Vec<Value> = keywords.try_iter()?.collect();
            let pairs: Result<Vec<(Value, Value)>> = names
                .into_iter()
                .map(|name| Ok((name.clone(), keywords.get_item(&name)?)))
                .collect();
            Value::from_pairs(pairs?)
        }
        Some((last, _)) if last.is_kwargs() => {
            return Err(error("`format` takes values or named values, not both"));
        }
        _ => Value::from(Tuple::from(args.to_vec())),
    };
    printf(state, &python_str(value)?, &values).map(Value::from)
}

/// A value that has to be text.
fn text_of(filter: &str, value: &Value) -> Result<String> {
    value.as_str().map(str::to_owned).ok_or_else(|| {
        error(format!(
            "`{filter}` takes text, not {}",
            super::type_name(value)
        ))
    })
}

fn file_size(_: &mut State, value: &Value, args: &[Value]) -> Result {
    let [binary] = bind("filesizeformat", ["binary"], args)?;
    let binary = flag_or(&binary, false);
    let size: f64 = python_str(value)?
        .trim()
        .parse()
        .map_err(|_| error("`filesizeformat` takes a number"))?;
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if size == 1.0 {
        return Ok(Value::from("1 Byte"));
    }
    if size < base {
        return Ok(Value::from(format!("{} Bytes", size.trunc())));
    }
    let units = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let mut unit = base;
    let mut name = units[0];
    for next in units {
        (unit, name) = (unit * base, next);
        if size < unit {
            break;
        }
    }
    let name = match (binary, name) {
        (true, "k") => "KiB".to_owned(),
        (true, name) => format!("{name}iB"),
        (false, name) => format!("{name}B"),
    };
    Ok(Value::from(format!("{:.1} {name}", base * size / unit)))
}

fn indent(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let [width, first, blank] = bind("indent", ["width", "first", "blank"], args)?;
    let (first, blank) = (flag_or(&first, false), flag_or(&blank, false));
    let indentation = match width.as_ref().and_then(Value::as_str) {
        Some(text) => text.to_owned(),
        None => {
            let width = usize::try_from(integer_or("indent", &width, 4)?).unwrap_or(0);
            charge(state, width)?;
            " ".repeat(width)
        }
    };
    let text = text_of("indent", value)?;
    let lines = super::text_search::split_lines(&(text + "\n"), false);
    charge(state, lines.len().saturating_mul(indentation.len()))?;
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        let line = line.as_str().unwrap_or_default();
        if i > 0 {
            out.push('\n');
        }
        let indents = if i == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        if indents {
            out.push_str(&indentation);
        }
        out.push_str(line);
    }
    Ok(Value::from(out))
}

fn truncate(_: &mut State, value: &Value, args: &[Value]) -> Result {
    let parameters = ["length", "killwords", "end", "leeway"];
    let [length, kill_words, end, leeway] = bind("truncate", parameters, args)?;
    let end = text_or("truncate", &end, "...")?;
    let leeway = leeway.filter(|leeway| !leeway.is_none());
    let length = integer_or("truncate", &length, 255)?;
    let leeway = integer_or("truncate", &leeway, 5)?;
    let kept = usize::try_from(length).ok();
    let kept = kept.and_then(|length| length.checked_sub(end.chars().count()));
    let (Some(kept), 0..) = (kept, leeway) else {
        return Err(error(
            "`truncate`: the length is below that of the end, or the leeway negative",
        ));
    };
    let text = text_of("truncate", value)?;
    if text.chars().count() as i64 <= length.saturating_add(leeway) {
        return Ok(Value::from(text));
    }
    let short: String = text.chars().take(kept).collect();
    let short = match flag_or(&kill_words, false) {
        true => short.as_str(),
        false => short
            .rsplit_once(' ')
            .map_or(short.as_str(), |(words, _)| words),
    };
    Ok(Value::from(format!("{short}{end}")))
}

fn quoted(value: &Value, for_query: bool) -> Result<String> {
    let mut out = String::new();
    for byte in python_str(value)?.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                out.push(char::from(byte));
            }
            b'/' if !for_query => out.push('/'),
            b' ' if for_query => out.push('+'),
            byte => drop(write!(out, "%{byte:02X}")),
        }
    }
    Ok(out)
}

fn url_encode(state: &mut State, value: &Value, _: &[Value]) -> Result {
    let is_map = value.kind() == ValueKind::Map;
    if !is_map && !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return quoted(value, false).map(Value::from);
    }
    let mut parts = Vec::new();
    for item in super::items(state, value)? {
        let (key, value) = match is_map {
            true => (item.clone(), value.get_item(&item)?),
            false => match super::items(state, &item)?.as_slice() {
                [key, value] => (key.clone(), value.clone()),
                _ => return Err(error("`urlencode` takes pairs of a key and a value")),
            },
        };
        parts.push(format!("{}={}", quoted(&key, true)?, quoted(&value, true)?));
    }
    Ok(Value::from(parts.join("&")))
}
