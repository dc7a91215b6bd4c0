//! Methods of values, as a template calls them.

use super::objects::View;
use super::{Result, bind, error, integer_or, items, objects, required, strings, type_name};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

pub(super) const OF_MAPPINGS: &[&str] = &[
    "clear",
    "copy",
    "fromkeys",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
];
pub(super) const OF_LISTS: &[&str] = &[
    "append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse",
    "sort",
];
pub(super) const OF_TUPLES: &[&str] = &["count", "index"];

/// Methods that would change a list or a mapping, which the sandbox forbids.
pub(super) const CHANGING: &[&str] = &[
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
];

pub(in super::super) fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result {
    match value.kind() {
        ValueKind::String => strings::call(state, value.as_str().unwrap_or_default(), method, args),
        ValueKind::Map if OF_MAPPINGS.contains(&method) => of_mapping(state, value, method, args),
        ValueKind::Seq | ValueKind::Iterable
            if OF_LISTS.contains(&method) && objects::type_name(value).is_none() =>
        {
            of_sequence(state, value, method, args)
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn refuse(value: &Value, method: &str) -> Error {
    error(format!(
        "`{method}` would change a {}, which templates may not: make a new one",
        type_name(value)
    ))
}

fn of_mapping(state: &State, value: &Value, method: &str, args: &[Value]) -> Result {
    let pairs = || -> Result<Vec<(Value, Value)>> {
        items(state, value)?
            .into_iter()
            .map(|key| Ok((key.clone(), value.get_item(&key)?)))
            .collect()
    };
    match method {
        "get" => {
            let [key, default] = bind("get", ["key", "default"], args)?;
            let key = required("get", "key", key)?;
            let found = value.get_item(&key)?;
            match found.is_undefined() {
                true => Ok(default.unwrap_or_else(|| Value::from(()))),
                false => Ok(found),
            }
        }
        method if CHANGING.contains(&method) => Err(refuse(value, method)),
        "fromkeys" => Err(error("`fromkeys` of a mapping: write `dict.fromkeys(...)`")),
        _ => {
            let [] = bind(method, [], args)?;
            let pairs = pairs()?;
            Ok(match method {
                "keys" => View::value("dict_keys", pairs.into_iter().map(|pair| pair.0).collect()),
                "values" => View::value(
                    "dict_values",
                    pairs.into_iter().map(|pair| pair.1).collect(),
                ),
                "items" => View::value(
                    "dict_items",
                    pairs
                        .into_iter()
                        .map(|(key, value)| Value::from(Tuple::from([key, value])))
                        .collect(),
                ),
                _ => Value::from_pairs(pairs),
            })
        }
    }
}

fn of_sequence(state: &State, value: &Value, method: &str, args: &[Value]) -> Result {
    if value.is_tuple() && !OF_TUPLES.contains(&method) {
        return Err(Error::from(ErrorKind::UnknownMethod));
    }
    if CHANGING.contains(&method) {
        return Err(refuse(value, method));
    }
    let items = items(state, value)?;
    match method {
        "copy" => {
            let [] = bind("copy", [], args)?;
            Ok(Value::from(items))
        }
        "count" => {
            let [what] = bind("count", ["value"], args)?;
            let what = required("count", "value", what)?;
            Ok(Value::from(
                items.iter().filter(|item| **item == what).count(),
            ))
        }
        _ => {
            let [what, start, stop] = bind("index", ["value", "start", "stop"], args)?;
            let what = required("index", "value", what)?;
            let bound = |at: i64| match at < 0 {
                true => items.len().saturating_sub(at.unsigned_abs() as usize),
                false => items.len().min(at as usize),
            };
            let start = bound(integer_or("index", &start, 0)?);
            let stop = bound(integer_or("index", &stop, i64::MAX)?).max(start);
            let at = items[start..stop].iter().position(|item| *item == what);
            at.map(|at| Value::from(start + at))
                .ok_or_else(|| error("`index`: the value is not in the list"))
        }
    }
}
