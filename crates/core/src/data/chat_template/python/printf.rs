//! `format % values`.
//!
//! The digits of a fraction are the engine's, which follows Python's specifications.

use super::repr::{python_ascii, python_repr, python_str};
use super::{Result, charge, error, type_name};
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::ValueKind;
use minijinja::{State, Value};
use std::iter::Peekable;
use std::str::Chars;

/// A placeholder of `%`: `%[(key)][flags][width][.precision]type`.
#[derive(Default)]
struct Placeholder {
    key: Option<String>,
    flags: String,
    width: usize,
    precision: Option<usize>,
}

/// What the placeholders of `%` are filled with.
struct Values<'a> {
    whole: &'a Value,
    positional: Vec<Value>,
    used: usize,
}

impl Values<'_> {
    fn next(&mut self) -> Result {
        let value = self.positional.get(self.used).cloned();
        self.used += 1;
        value.ok_or_else(|| error("`%`: fewer values than placeholders"))
    }

    fn take(&mut self, key: Option<&str>) -> Result {
        let Some(key) = key else {
            return self.next();
        };
        self.used = self.positional.len();
        let found = match self.whole.kind() {
            ValueKind::Map => self.whole.get_item(&Value::from(key))?,
            _ => return Err(error("`%(name)s` needs a mapping")),
        };
        match found.is_undefined() {
            true => Err(error(format!("`%`: the mapping has no `{key}`"))),
            false => Ok(found),
        }
    }
}

/// `format % value`.
pub(super) fn printf(state: &State, text: &str, value: &Value) -> Result<String> {
    let mut values = Values {
        whole: value,
        positional: match value.is_tuple() {
            true => value.try_iter()?.collect(),
            false => vec![value.clone()],
        },
        used: 0,
    };
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let placeholder = read_placeholder(&mut chars, &mut values)?;
        charge(
            state,
            placeholder.width + placeholder.precision.unwrap_or(0),
        )?;
        let kind = chars
            .next()
            .ok_or_else(|| error("`%`: an incomplete format"))?;
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = values.take(placeholder.key.as_deref())?;
        out.push_str(&filled(&placeholder, kind, &value)?);
    }
    let may_be_left = !value.is_tuple() && matches!(value.kind(), ValueKind::Map | ValueKind::Seq);
    if values.used < values.positional.len() && !may_be_left {
        return Err(error("`%`: more values than placeholders"));
    }
    Ok(out)
}

fn read_placeholder(chars: &mut Peekable<Chars>, values: &mut Values) -> Result<Placeholder> {
    let mut placeholder = Placeholder::default();
    if chars.next_if_eq(&'(').is_some() {
        let mut key = String::new();
        loop {
            match chars.next() {
                Some(')') => break,
                Some(c) => key.push(c),
                None => return Err(error("`%`: a name that is not closed")),
            }
        }
        placeholder.key = Some(key);
    }
    while let Some(flag) = chars.next_if(|c| "#0- +".contains(*c)) {
        placeholder.flags.push(flag);
    }
    placeholder.width = match chars.next_if_eq(&'*') {
        Some(_) => star(&mut values.next()?, &mut placeholder.flags)?,
        None => digits(chars)?.unwrap_or(0),
    };
    if chars.next_if_eq(&'.').is_some() {
        placeholder.precision = Some(match chars.next_if_eq(&'*') {
            Some(_) => star(&mut values.next()?, &mut String::new())?,
            None => digits(chars)?.unwrap_or(0),
        });
    }
    while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
    Ok(placeholder)
}

/// A width that is given as a value; a negative one aligns to the left.
fn star(value: &mut Value, flags: &mut String) -> Result<usize> {
    let width = super::integer("`%*d`", value)?;
    if width < 0 {
        flags.push('-');
    }
    usize::try_from(width.unsigned_abs()).map_err(|_| error("`%`: a width too large"))
}

fn digits(chars: &mut Peekable<Chars>) -> Result<Option<usize>> {
    let mut text = String::new();
    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
        text.push(digit);
    }
    match text.is_empty() {
        true => Ok(None),
        false => text
            .parse()
            .map(Some)
            .map_err(|_| error("a width or precision too large")),
    }
}

fn filled(placeholder: &Placeholder, kind: char, value: &Value) -> Result<String> {
    let text = match kind {
        's' => python_str(value)?,
        'r' => python_repr(value)?,
        'a' => python_ascii(value)?,
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => return whole_number(placeholder, kind, value),
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => return fraction(placeholder, kind, value),
        'c' => character(value)?,
        other => return Err(error(format!("`%`: there is no format `%{other}`"))),
    };
    let text = match placeholder.precision {
        Some(length) if kind != 'c' => text.chars().take(length).collect(),
        _ => text,
    };
    Ok(aligned(placeholder, "", &text, false))
}

fn character(value: &Value) -> Result<String> {
    if let Some(text) = value.as_str().filter(|text| text.chars().count() == 1) {
        return Ok(text.to_owned());
    }
    value
        .as_i64()
        .and_then(|code| char::from_u32(u32::try_from(code).ok()?))
        .map(String::from)
        .ok_or_else(|| error("`%c` takes a character or its number"))
}

/// A text of a width, zeros going after the sign.
fn aligned(placeholder: &Placeholder, sign: &str, text: &str, is_number: bool) -> String {
    let length = sign.chars().count() + text.chars().count();
    let missing = placeholder.width.saturating_sub(length);
    if placeholder.flags.contains('-') {
        format!("{sign}{text}{}", " ".repeat(missing))
    } else if is_number && placeholder.flags.contains('0') {
        format!("{sign}{}{text}", "0".repeat(missing))
    } else {
        format!("{}{sign}{text}", " ".repeat(missing))
    }
}

fn whole_number(placeholder: &Placeholder, kind: char, value: &Value) -> Result<String> {
    let is_decimal = matches!(kind, 'd' | 'i' | 'u');
    let number = match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        ValueKind::Number if is_decimal => f64::try_from(value.clone())
            .ok()
            .filter(|float| float.abs() < 1e38)
            .map(|float| float as i128),
        _ => None,
    };
    let Some(number) = number else {
        return Err(error(format!(
            "`%{kind}` takes a number, not {}",
            type_name(value)
        )));
    };
    let magnitude = number.unsigned_abs();
    let alternate = placeholder.flags.contains('#');
    let (prefix, digits) = match kind {
        'x' => (if alternate { "0x" } else { "" }, format!("{magnitude:x}")),
        'X' => (if alternate { "0X" } else { "" }, format!("{magnitude:X}")),
        'o' => (if alternate { "0o" } else { "" }, format!("{magnitude:o}")),
        _ => ("", magnitude.to_string()),
    };
    let zeros = placeholder
        .precision
        .unwrap_or(0)
        .saturating_sub(digits.len());
    let digits = "0".repeat(zeros) + &digits;
    let sign = format!("{}{prefix}", sign_of(placeholder, number < 0));
    Ok(aligned(placeholder, &sign, &digits, true))
}

fn sign_of(placeholder: &Placeholder, negative: bool) -> &'static str {
    match negative {
        true => "-",
        false if placeholder.flags.contains('+') => "+",
        false if placeholder.flags.contains(' ') => " ",
        false => "",
    }
}

fn fraction(placeholder: &Placeholder, kind: char, value: &Value) -> Result<String> {
    let number = match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        _ => None,
    };
    let Some(number) = number else {
        return Err(error(format!(
            "`%{kind}` takes a number, not {}",
            type_name(value)
        )));
    };
    let alternate = if placeholder.flags.contains('#') {
        "#"
    } else {
        ""
    };
    let precision = placeholder.precision.unwrap_or(6);
    let specification = format!("%{alternate}.{precision}{kind}");
    let magnitude = Value::from(number.abs());
    let text = format(FormatStyle::Printf, &specification, &[magnitude])?;
    let sign = sign_of(placeholder, number.is_sign_negative() && !number.is_nan());
    Ok(aligned(placeholder, sign, &text, number.is_finite()))
}
