//! The `tojson` filter as Python's `json.dumps` writes it, without HTML escapes.

use super::python;
use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Error, ErrorKind, State, Value};
use std::fmt::Write;

/// Deeper nesting is refused: the writer recurses.
const MAX_DEPTH: usize = 200;

struct Writer {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
///
/// # Source
/// The filter of the same name that transformers gives to chat templates.
pub(super) fn tojson(
    state: &State,
    value: &Value,
    args: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    let parameters = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] =
        python::bind("tojson", parameters, &args.into_values())?;
    let ensure_ascii = ensure_ascii.is_some_and(|value| value.is_true());
    let sort_keys = sort_keys.is_some_and(|value| value.is_true());
    let separators = match separators.filter(|value| !value.is_none()) {
        Some(pair) => Some(pair.try_iter()?.collect::<Vec<Value>>()),
        None => None,
    };
    let indent = indent_text(indent.as_ref())?;
    let texts = separators
        .as_ref()
        .map(|pair| pair.iter().map(Value::as_str).collect::<Vec<_>>());
    let (item_separator, key_separator) = match texts.as_deref() {
        Some([Some(item), Some(key)]) => ((*item).to_owned(), (*key).to_owned()),
        Some(_) => return Err(invalid("tojson: `separators` takes two strings")),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let mut writer = Writer {
        out: String::new(),
        ensure_ascii,
        sort_keys,
        indent,
        item_separator,
        key_separator,
    };
    writer.value(state, value, 0)?;
    Ok(Value::from(writer.out))
}

fn indent_text(indent: Option<&Value>) -> Result<Option<String>, Error> {
    match indent {
        None => Ok(None),
        Some(value) if value.is_none() || value.is_undefined() => Ok(None),
        Some(value) if value.as_str().is_some_and(|s| s.len() <= 64) => {
            Ok(value.as_str().map(str::to_owned))
        }
        Some(value) => match value.as_usize() {
            Some(width) if width <= 64 => Ok(Some(" ".repeat(width))),
            _ => Err(invalid("tojson: `indent` takes a width of at most 64")),
        },
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

impl Writer {
    fn value(&mut self, state: &State, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("tojson: nested deeper than {MAX_DEPTH}")));
        }
        state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => {
                let text = value.as_str().unwrap_or_default();
                state.consume_fuel(text.len() as u64 / 64)?;
                self.string(text);
            }
            ValueKind::Seq | ValueKind::Iterable => {
                if python::is_plain_iterable(value) {
                    return Err(invalid(
                        "tojson: a generator, range or view is not JSON serializable: add `| list`",
                    ));
                }
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container(('[', ']'), depth, items.len(), |writer, i| {
                    writer.value(state, &items[i], depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.container(('{', '}'), depth, keys.len(), |writer, i| {
                    writer.key(&keys[i])?;
                    writer.value(state, &value.get_item(&keys[i])?, depth + 1)
                })?;
            }
            kind => return Err(invalid(format!("tojson: {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn container(
        &mut self,
        (open, close): (char, char),
        depth: usize,
        items: usize,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..items {
            if i > 0 {
                self.out.push_str(&self.item_separator);
            }
            self.line_break(depth + 1);
            item(self, i)?;
        }
        if items > 0 {
            self.line_break(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line_break(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::Number | ValueKind::Bool | ValueKind::None => {
                self.out.push('"');
                match key.kind() {
                    ValueKind::Number => self.number(key),
                    ValueKind::Bool => {
                        self.out
                            .push_str(if key.is_true() { "true" } else { "false" });
                    }
                    _ => self.out.push_str("null"),
                }
                self.out.push('"');
            }
            kind => return Err(invalid(format!("tojson: a key cannot be {kind}"))),
        }
        self.out.push_str(&self.key_separator);
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        if value.is_integer() {
            let _ = write!(self.out, "{value}");
        } else {
            let number = f64::try_from(value.clone()).unwrap_or(f64::NAN);
            self.out.push_str(&match number {
                number if number.is_nan() => "NaN".to_owned(),
                f64::INFINITY => "Infinity".to_owned(),
                f64::NEG_INFINITY => "-Infinity".to_owned(),
                number => python::python_float(number),
            });
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
