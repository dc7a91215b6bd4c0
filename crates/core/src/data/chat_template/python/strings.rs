//! Methods of strings.

use super::format::{format_map, str_format};
use super::repr::is_printable;
use super::tables::{is_decimal, is_digit};
use super::text_search::{find, has_affix, partition, searched, split, split_lines};
use super::{
    Result, bind, charge, error, flag_or, integer, integer_or, items, required, text_or, type_name,
};
use minijinja::{Error, ErrorKind, State, Value};

pub(super) const METHODS: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];

/// What Python counts as whitespace.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `text.method(...)`.
pub(super) fn call(state: &State, text: &str, method: &str, args: &[Value]) -> Result {
    if let Some(answer) = predicate(text, method)? {
        let [] = bind(method, [], args)?;
        return Ok(Value::from(answer));
    }
    charge(state, text.len())?;
    match method {
        "upper" | "lower" | "title" | "capitalize" | "swapcase" | "casefold" => {
            let [] = bind(method, [], args)?;
            changed_case(text, method).map(Value::from)
        }
        "strip" | "lstrip" | "rstrip" => strip(text, method, args),
        "split" | "rsplit" => split(text, method, args),
        "splitlines" => {
            let [keep] = bind(method, ["keepends"], args)?;
            Ok(Value::from(split_lines(text, flag_or(&keep, false))))
        }
        "partition" | "rpartition" => partition(text, method, args),
        "startswith" | "endswith" => has_affix(text, method, args),
        "find" | "rfind" | "index" | "rindex" => find(text, method, args),
        "count" => {
            let (part, window, _) = searched(text, method, args)?;
            Ok(Value::from(match part.is_empty() {
                true => window.map_or(0, |window| window.chars().count() + 1),
                false => window.map_or(0, |window| window.matches(part.as_str()).count()),
            }))
        }
        "replace" => {
            let [old, new, count] = bind(method, ["old", "new", "count"], args)?;
            let old = required(method, "old", old)?;
            let new = required(method, "new", new)?;
            replace(state, text, &old, &new, count).map(Value::from)
        }
        "zfill" | "center" | "ljust" | "rjust" => pad(state, text, method, args),
        "expandtabs" => {
            let [size] = bind(method, ["tabsize"], args)?;
            expand_tabs(state, text, integer_or(method, &size, 8)?).map(Value::from)
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = bind(method, ["affix"], args)?;
            let affix = required(method, "affix", affix)?;
            let affix = text_or(method, &Some(affix), "")?.to_owned();
            let rest = match method {
                "removeprefix" => text.strip_prefix(affix.as_str()),
                _ => text.strip_suffix(affix.as_str()),
            };
            Ok(Value::from(rest.unwrap_or(text)))
        }
        "join" => {
            let [values] = bind(method, ["iterable"], args)?;
            join(state, text, &required(method, "iterable", values)?)
        }
        "format" => str_format(state, text, args).map(Value::from),
        "format_map" => {
            let [mapping] = bind(method, ["mapping"], args)?;
            let mapping = required(method, "mapping", mapping)?;
            format_map(state, text, &mapping).map(Value::from)
        }
        "encode" => Err(error("`encode` gives bytes, which templates cannot print")),
        "translate" => Err(error("`translate` is not supported: use `replace`")),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

pub(super) fn predicate(text: &str, method: &str) -> Result<Option<bool>> {
    let all = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    let cased = |c: char| c.is_lowercase() || c.is_uppercase();
    Ok(Some(match method {
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isascii" => text.is_ascii(),
        "isspace" => all(is_space),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(is_digit),
        "isnumeric" => {
            if text.chars().any(|c| c.is_alphabetic() && c >= '\u{3000}') {
                return Err(error("`isnumeric` of ideographs is not supported"));
            }
            all(char::is_numeric)
        }
        "isprintable" => text.chars().all(is_printable),
        "islower" => text.chars().any(cased) && !text.chars().any(char::is_uppercase),
        "isupper" => text.chars().any(cased) && !text.chars().any(char::is_lowercase),
        "isidentifier" => {
            let mut chars = text.chars();
            let start = chars.next().is_some_and(|c| c.is_alphabetic() || c == '_');
            start && chars.all(|c| c.is_alphanumeric() || c == '_')
        }
        "istitle" => {
            let mut before = false;
            let mut any = false;
            let fits = text.chars().all(|c| {
                let fits = match (c.is_uppercase(), c.is_lowercase()) {
                    (true, _) => !before,
                    (_, true) => before,
                    _ => true,
                };
                before = cased(c);
                any |= before;
                fits
            });
            any && fits
        }
        _ => return Ok(None),
    }))
}

fn changed_case(text: &str, method: &str) -> Result<String> {
    Ok(match method {
        "upper" => text.to_uppercase(),
        "lower" => text.to_lowercase(),
        "capitalize" => capitalized(text),
        "swapcase" => text
            .chars()
            .flat_map(|c| -> Box<dyn Iterator<Item = char>> {
                match c.is_uppercase() {
                    true => Box::new(c.to_lowercase()),
                    false => Box::new(c.to_uppercase()),
                }
            })
            .collect(),
        "title" => {
            let mut out = String::with_capacity(text.len());
            let mut before = false;
            for c in text.chars() {
                match before {
                    true => out.extend(c.to_lowercase()),
                    false => out.push_str(&capitalized(c.encode_utf8(&mut [0; 4]))),
                }
                before = c.is_lowercase() || c.is_uppercase();
            }
            out
        }
        _ => {
            if text
                .chars()
                .any(|c| !c.is_ascii() && c.is_alphabetic() && c != 'ß')
            {
                return Err(error(
                    "`casefold` beyond ASCII is not supported: use `lower`",
                ));
            }
            text.to_lowercase().replace('ß', "ss")
        }
    })
}

/// The first letter in title case, the others in lower case.
pub(super) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let Some(first) = chars.next() else {
        return String::new();
    };
    // A letter that becomes several is a capital and small ones; digraphs have forms of their own.
    let mut out = String::with_capacity(text.len());
    match first {
        'ǆ' | 'ǅ' | 'Ǆ' => out.push('ǅ'),
        'ǉ' | 'ǈ' | 'Ǉ' => out.push('ǈ'),
        'ǌ' | 'ǋ' | 'Ǌ' => out.push('ǋ'),
        'ǳ' | 'ǲ' | 'Ǳ' => out.push('ǲ'),
        first => {
            let mut upper = first.to_uppercase();
            out.extend(upper.next());
            out.extend(upper.flat_map(char::to_lowercase));
        }
    }
    out + &chars.as_str().to_lowercase()
}

fn strip(text: &str, method: &str, args: &[Value]) -> Result {
    let [chars] = bind(method, ["chars"], args)?;
    let chars = chars.filter(|value| !value.is_none());
    let set = match &chars {
        Some(_) => Some(text_or(method, &chars, "")?),
        None => None,
    };
    Ok(Value::from(stripped(text, set, method)))
}

/// A text without these characters, or whitespace, at its ends.
pub(super) fn stripped<'a>(text: &'a str, chars: Option<&str>, method: &str) -> &'a str {
    let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    match method {
        "lstrip" => text.trim_start_matches(strips),
        "rstrip" => text.trim_end_matches(strips),
        _ => text.trim_matches(strips),
    }
}

/// `text.replace(old, new, count)`.
pub(super) fn replace(
    state: &State,
    text: &str,
    old: &Value,
    new: &Value,
    count: Option<Value>,
) -> Result<String> {
    let (Some(old), Some(new)) = (old.as_str(), new.as_str()) else {
        return Err(error("`replace` takes two texts"));
    };
    let count = count.filter(|value| !value.is_none());
    let count = usize::try_from(integer_or("replace", &count, -1)?).unwrap_or(usize::MAX);
    let matches = (text.len() / old.len().max(1) + 1).min(count);
    charge(
        state,
        matches.saturating_mul(new.len().saturating_sub(old.len())),
    )?;
    Ok(text.replacen(old, new, count))
}

fn pad(state: &State, text: &str, method: &str, args: &[Value]) -> Result {
    let [width, fill] = bind(method, ["width", "fillchar"], args)?;
    let width = integer(method, &required(method, "width", width)?)?;
    if method == "zfill" {
        let [_] = bind(method, ["width"], args)?;
        let missing = missing(state, text, width)?;
        let sign = usize::from(text.starts_with(['+', '-']));
        let (sign, digits) = text.split_at(sign);
        return Ok(Value::from(format!(
            "{sign}{}{digits}",
            "0".repeat(missing)
        )));
    }
    let fill = text_or(method, &fill, " ")?;
    if fill.chars().count() != 1 {
        return Err(error(format!("`{method}` fills with one character")));
    }
    padded(state, text, width, fill, method).map(Value::from)
}

fn missing(state: &State, text: &str, width: i64) -> Result<usize> {
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    charge(state, missing.saturating_mul(4))?;
    Ok(missing)
}

/// A text in the middle (`center`), at the left (`ljust`) or the right (`rjust`) of a width.
pub(super) fn padded(
    state: &State,
    text: &str,
    width: i64,
    fill: &str,
    method: &str,
) -> Result<String> {
    let missing = missing(state, text, width)?;
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        _ => missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1),
    };
    Ok(fill.repeat(left) + text + &fill.repeat(missing - left))
}

fn expand_tabs(state: &State, text: &str, size: i64) -> Result<String> {
    let size = usize::try_from(size).unwrap_or(0);
    let tabs = text.matches('\t').count();
    charge(state, tabs.saturating_mul(size))?;
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out.push_str(&" ".repeat(spaces));
                column += spaces;
            }
            '\t' => {}
            c => {
                column = if c == '\n' || c == '\r' {
                    0
                } else {
                    column + 1
                };
                out.push(c);
            }
        }
    }
    Ok(out)
}

fn join(state: &State, separator: &str, values: &Value) -> Result {
    let mut out = String::new();
    for (i, item) in items(state, values)?.iter().enumerate() {
        let Some(text) = item.as_str() else {
            return Err(error(format!(
                "`join`: item {i} is {}, not text",
                type_name(item)
            )));
        };
        charge(state, separator.len() + text.len())?;
        if i > 0 {
            out.push_str(separator);
        }
        out.push_str(text);
    }
    Ok(Value::from(out))
}
