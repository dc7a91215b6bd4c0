use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// `value` as a JSON number, or as the string `NaN`, `Infinity` or `-Infinity`.
#[must_use]
pub fn json_number(value: f64) -> Value {
    if value.is_finite() {
        json!(value)
    } else if value.is_nan() {
        json!("NaN")
    } else if value > 0.0 {
        json!("Infinity")
    } else {
        json!("-Infinity")
    }
}

/// Reads what [`json_number`] wrote; `None` for anything else.
#[must_use]
pub fn number_from_json(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some("NaN") => Some(f64::NAN),
        Some("Infinity") => Some(f64::INFINITY),
        Some("-Infinity") => Some(f64::NEG_INFINITY),
        _ => value.as_f64(),
    }
}

/// Named values, sorted by name: a row of a log.
pub(super) type Row = BTreeMap<String, Value>;

/// A row of `entries`, sorted by name.
pub(super) fn row<const N: usize>(entries: [(&str, Value); N]) -> Row {
    let entries = entries.into_iter();
    entries
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// `row` as pretty JSON with four blanks per level and a final newline, as Transformers writes its
/// results.
pub(super) fn pretty(row: &Row) -> String {
    let entries = row.iter();
    let lines: Vec<_> = entries
        .map(|(name, value)| format!("    {}: {value}", json!(name)))
        .collect();
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

/// `row` on one line, in the order of `entries`.
pub(super) fn line(entries: Vec<(&str, Value)>) -> String {
    let map: Map<String, Value> = entries
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    format!("{}\n", Value::Object(map))
}
