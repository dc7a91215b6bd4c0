//! Jinja's filters of numbers.

use super::{Filter, Result, add_filters, bind, error, integer_or, strings, text_or, type_name};
use minijinja::value::ValueKind;
use minijinja::{Environment, State, Value};

const FILTERS: &[(&str, Filter)] = &[("float", float), ("int", int), ("round", round)];

pub(super) fn install(environment: &mut Environment<'static>) {
    add_filters(environment, FILTERS);
}

fn float(_: &mut State, value: &Value, args: &[Value]) -> Result {
    let [default] = bind("float", ["default"], args)?;
    let parsed = match value.kind() {
        ValueKind::Undefined => return Err(error("`float` of an undefined value")),
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => parse_float(value.as_str().unwrap_or_default()),
        _ => None,
    };
    Ok(parsed.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from))
}

fn parse_float(text: &str) -> Option<f64> {
    let text = strings::stripped(text, None, "strip");
    let groups = text.split('_').all(|group| !group.is_empty());
    let text = text.replace('_', "");
    groups.then(|| text.parse().ok()).flatten()
}

fn int(_: &mut State, value: &Value, args: &[Value]) -> Result {
    let [default, base] = bind("int", ["default", "base"], args)?;
    let base = integer_or("int", &base, 10)?;
    let from_float = |float: f64| match float.is_finite() && float.abs() < 1e38 {
        true => Some(Value::from(float as i128)),
        false => None,
    };
    let parsed = match value.kind() {
        ValueKind::Undefined => return Err(error("`int` of an undefined value")),
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => from_float(f64::try_from(value.clone()).unwrap_or(f64::NAN)),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            match parse_integer(text, base)? {
                Some(number) => Some(Value::from(number)),
                None => parse_float(text).and_then(from_float),
            }
        }
        _ => None,
    };
    Ok(parsed.unwrap_or_else(|| default.unwrap_or_else(|| Value::from(0))))
}

/// `int(text, base)`, or nothing.
fn parse_integer(text: &str, base: i64) -> Result<Option<i128>> {
    let base = u32::try_from(base)
        .ok()
        .filter(|base| (2..=36).contains(base));
    let base = base.ok_or_else(|| error("`int` takes a base from 2 to 36"))?;
    let text = strings::stripped(text, None, "strip").to_lowercase();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefix = match base {
        16 => "0x",
        8 => "0o",
        2 => "0b",
        _ => "",
    };
    let digits = digits.strip_prefix(prefix).unwrap_or(digits);
    let fits = digits.split('_').all(|group| !group.is_empty())
        && digits.chars().all(|c| c == '_' || c.is_digit(base));
    if !fits {
        return Ok(None);
    }
    let number = i128::from_str_radix(&digits.replace('_', ""), base)
        .map_err(|_| error("`int` of a number that is too large"))?;
    Ok(Some(if negative { -number } else { number }))
}

fn round(_: &mut State, value: &Value, args: &[Value]) -> Result {
    let [precision, method] = bind("round", ["precision", "method"], args)?;
    let precision = integer_or("round", &precision, 0)?;
    let method = text_or("round", &method, "common")?;
    if !value.is_number() && value.kind() != ValueKind::Bool {
        return Err(error(format!("`round` of {}", type_name(value))));
    }
    let number =
        f64::try_from(value.clone()).unwrap_or_else(|_| f64::from(u8::from(value.is_true())));
    if method == "common" {
        return Ok(match value.kind() {
            ValueKind::Bool => Value::from(number as i64),
            _ if value.is_integer() => value.clone(),
            _ => Value::from(rounded(number, precision)),
        });
    }
    let scale = 10_f64.powi(i32::try_from(precision).unwrap_or(i32::MAX));
    match method {
        "ceil" => Ok(Value::from((number * scale).ceil() / scale)),
        "floor" => Ok(Value::from((number * scale).floor() / scale)),
        other => Err(error(format!(
            "`round` by `common`, `ceil` or `floor`, not `{other}`"
        ))),
    }
}

/// `round(number, precision)`: of the exact decimal value, halves to even.
fn rounded(number: f64, precision: i64) -> f64 {
    if !number.is_finite() || precision > 323 {
        return number;
    }
    match usize::try_from(precision) {
        Ok(digits) => format!("{number:.digits$}").parse().unwrap_or(number),
        Err(_) => {
            let scale = 10_f64.powi(i32::try_from(-precision).unwrap_or(i32::MAX));
            (number / scale).round_ties_even() * scale
        }
    }
}
