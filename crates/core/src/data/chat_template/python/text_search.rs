//! Methods of strings that look for something in them, or cut them where it is.

use super::strings::is_space;
use super::{Result, bind, error, integer_or, required, text_or, type_name};
use minijinja::Value;
use minijinja::value::{Tuple, ValueKind};

pub(super) fn split(text: &str, method: &str, args: &[Value]) -> Result {
    let [separator, limit] = bind(method, ["sep", "maxsplit"], args)?;
    let limit = usize::try_from(integer_or(method, &limit, -1)?).unwrap_or(usize::MAX - 1);
    let separator = separator.filter(|value| !value.is_none());
    let from_right = method == "rsplit";
    let mut parts: Vec<&str> = match &separator {
        None => split_at_spaces(text, limit, from_right),
        Some(_) => {
            let separator = text_or(method, &separator, "")?;
            if separator.is_empty() {
                return Err(error(format!("`{method}`: an empty separator")));
            }
            match from_right {
                true => text.rsplitn(limit + 1, separator).collect(),
                false => text.splitn(limit + 1, separator).collect(),
            }
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Runs of other characters than whitespace; from the right, the last run comes first.
fn split_at_spaces(text: &str, limit: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = match from_right {
            true => rest.trim_end_matches(is_space),
            false => rest.trim_start_matches(is_space),
        };
        if rest.is_empty() {
            return parts;
        }
        if parts.len() == limit {
            parts.push(rest);
            return parts;
        }
        let part = match from_right {
            true => {
                let space = rest.char_indices().rev().find(|(_, c)| is_space(*c));
                let (before, part) = rest.split_at(space.map_or(0, |(at, c)| at + c.len_utf8()));
                rest = before;
                part
            }
            false => {
                let (part, after) = rest.split_at(rest.find(is_space).unwrap_or(rest.len()));
                rest = after;
                part
            }
        };
        parts.push(part);
    }
}

pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<Value> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(ends).unwrap_or(rest.len());
        let after = match rest[end..].chars().next() {
            Some('\r') if rest[end + 1..].starts_with('\n') => end + 2,
            Some(c) => end + c.len_utf8(),
            None => end,
        };
        lines.push(Value::from(&rest[..if keep_ends { after } else { end }]));
        rest = &rest[after..];
    }
    lines
}

pub(super) fn partition(text: &str, method: &str, args: &[Value]) -> Result {
    let [separator] = bind(method, ["sep"], args)?;
    let separator = required(method, "sep", separator)?;
    let separator = text_or(method, &Some(separator.clone()), "")?.to_owned();
    if separator.is_empty() {
        return Err(error(format!("`{method}`: an empty separator")));
    }
    let parts = match method {
        "partition" => match text.split_once(separator.as_str()) {
            Some((before, after)) => [before, &separator, after],
            None => [text, "", ""],
        },
        _ => match text.rsplit_once(separator.as_str()) {
            Some((before, after)) => [before, &separator, after],
            None => ["", "", text],
        },
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// The window of a text between two character numbers, which may count from the end, and its start.
/// Nothing where the start is beyond the end.
fn window(text: &str, start: i64, stop: i64) -> Option<(&str, usize)> {
    let length = text.chars().count() as i64;
    let bound = |at: i64| if at < 0 { (at + length).max(0) } else { at };
    let (start, stop) = (bound(start), bound(stop).min(length));
    if start > stop {
        return None;
    }
    let byte = |at: i64| {
        let place = text.char_indices().nth(at as usize);
        place.map_or(text.len(), |(byte, _)| byte)
    };
    Some((&text[byte(start)..byte(stop)], start as usize))
}

/// What is looked for, the window it is looked for in, and the number of the window's first character.
pub(super) fn searched<'a>(
    text: &'a str,
    method: &str,
    args: &[Value],
) -> Result<(String, Option<&'a str>, usize)> {
    let [part, start, stop] = bind(method, ["sub", "start", "end"], args)?;
    let part = required(method, "sub", part)?;
    let Some(part) = part.as_str() else {
        return Err(error(format!(
            "`{method}` takes text, not {}",
            type_name(&part)
        )));
    };
    let none = |value: Option<Value>| value.filter(|value| !value.is_none());
    let start = integer_or(method, &none(start), 0)?;
    let stop = integer_or(method, &none(stop), i64::MAX)?;
    let found = window(text, start, stop);
    Ok((
        part.to_owned(),
        found.map(|found| found.0),
        found.map_or(0, |found| found.1),
    ))
}

pub(super) fn find(text: &str, method: &str, args: &[Value]) -> Result {
    let (part, window, start) = searched(text, method, args)?;
    let found = window.and_then(|window| {
        let at = match method.starts_with('r') {
            true => window.rfind(part.as_str()),
            false => window.find(part.as_str()),
        };
        at.map(|at| window[..at].chars().count() + start)
    });
    match (found, method.ends_with("index")) {
        (Some(at), _) => Ok(Value::from(at)),
        (None, true) => Err(error(format!("`{method}`: the text is not found"))),
        (None, false) => Ok(Value::from(-1)),
    }
}

pub(super) fn has_affix(text: &str, method: &str, args: &[Value]) -> Result {
    let [affix, start, stop] = bind(method, ["prefix", "start", "end"], args)?;
    let affix = required(method, "prefix", affix)?;
    let affixes = match affix.kind() {
        ValueKind::Seq if affix.is_tuple() => affix.try_iter()?.collect(),
        _ => vec![affix],
    };
    let start = integer_or(method, &start, 0)?;
    let stop = integer_or(method, &stop, i64::MAX)?;
    let Some((window, _)) = window(text, start, stop) else {
        return Ok(Value::from(false));
    };
    for affix in affixes {
        let Some(affix) = affix.as_str() else {
            return Err(error(format!(
                "`{method}` takes text or a tuple of texts, not {}",
                type_name(&affix)
            )));
        };
        let found = match method {
            "startswith" => window.starts_with(affix),
            _ => window.ends_with(affix),
        };
        if found {
            return Ok(Value::from(true));
        }
    }
    Ok(Value::from(false))
}
