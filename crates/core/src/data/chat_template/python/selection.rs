//! Filters that choose, change or group items: `map`, `select`, `unique`, `groupby` and others.

use super::filters::{at_path, folded, sort_by_keys};
use super::objects::{Generator, Group};
use super::operators::hashable;
use super::{Filter, Result, add_filters, bind, error, flag_or, items, required};
use minijinja::value::{Kwargs, from_args};
use minijinja::{Environment, State, Value};

const FILTERS: &[(&str, Filter)] = &[
    ("groupby", group_by),
    ("map", map),
    ("reject", |state, value, args| {
        select(state, value, args, false)
    }),
    ("rejectattr", |state, value, args| {
        select_attribute(state, value, args, false)
    }),
    ("select", |state, value, args| {
        select(state, value, args, true)
    }),
    ("selectattr", |state, value, args| {
        select_attribute(state, value, args, true)
    }),
    ("unique", unique),
];

pub(super) fn install(environment: &mut Environment<'static>) {
    add_filters(environment, FILTERS);
}

fn map(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let mut mapped = Vec::new();
    if let [only] = args
        && only.is_kwargs()
    {
        let (keywords,): (Kwargs,) = from_args(args)?;
        let path: Value = keywords.get("attribute")?;
        let default: Option<Value> = keywords.get("default")?;
        keywords.assert_all_used()?;
        for item in items(state, value)? {
            mapped.push(at_path(&item, &path, default.as_ref())?);
        }
        return Ok(Generator::value(mapped));
    }
    let (name, rest) = named("map", "filter", args)?;
    for item in items(state, value)? {
        let mut args = vec![item];
        args.extend_from_slice(rest);
        mapped.push(
            state
                .apply_filter(name, &args)
                .map_err(|e| unknown(e, name))?,
        );
    }
    Ok(Generator::value(mapped))
}

/// The name of a filter or test, and what it is given.
fn named<'a>(function: &str, what: &str, args: &'a [Value]) -> Result<(&'a str, &'a [Value])> {
    args.split_first()
        .and_then(|(name, rest)| Some((name.as_str()?, rest)))
        .ok_or_else(|| error(format!("`{function}` needs the name of a {what}")))
}

/// Names a filter or test that does not exist.
fn unknown(failure: minijinja::Error, name: &str) -> minijinja::Error {
    match failure.detail() {
        Some(_) => failure,
        None => error(format!("{}: `{name}`", failure.kind())),
    }
}

fn passes(state: &mut State, value: Value, args: &[Value]) -> Result<bool> {
    if args.is_empty() {
        return Ok(value.is_true());
    }
    let (name, rest) = named("select", "test", args)?;
    let mut args = vec![value];
    args.extend_from_slice(rest);
    state
        .perform_test(name, &args)
        .map_err(|e| unknown(e, name))
}

fn select(state: &mut State, value: &Value, args: &[Value], wanted: bool) -> Result {
    let mut selected = Vec::new();
    for item in items(state, value)? {
        if passes(state, item.clone(), args)? == wanted {
            selected.push(item);
        }
    }
    Ok(Generator::value(selected))
}

fn select_attribute(state: &mut State, value: &Value, args: &[Value], wanted: bool) -> Result {
    let (path, args) = args
        .split_first()
        .ok_or_else(|| error("`selectattr` needs the name of an attribute"))?;
    let mut selected = Vec::new();
    for item in items(state, value)? {
        let attribute = at_path(&item, path, None)?;
        if passes(state, attribute, args)? == wanted {
            selected.push(item);
        }
    }
    Ok(Generator::value(selected))
}

fn unique(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let [case_sensitive, attribute] = bind("unique", ["case_sensitive", "attribute"], args)?;
    let case_sensitive = flag_or(&case_sensitive, false);
    let mut seen: Vec<Value> = Vec::new();
    let mut kept = Vec::new();
    for item in items(state, value)? {
        let key = match &attribute {
            Some(path) => at_path(&item, path, None)?,
            None => item.clone(),
        };
        let key = folded(key, case_sensitive);
        hashable(&key)?;
        state.consume_fuel(seen.len() as u64 / 16)?;
        if !seen.contains(&key) {
            seen.push(key);
            kept.push(item);
        }
    }
    Ok(Generator::value(kept))
}

fn group_by(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let parameters = ["attribute", "default", "case_sensitive"];
    let [attribute, default, case_sensitive] = bind("groupby", parameters, args)?;
    let path = required("groupby", "attribute", attribute)?;
    let case_sensitive = flag_or(&case_sensitive, false);
    let mut keyed = Vec::new();
    for item in items(state, value)? {
        let key = at_path(&item, &path, default.as_ref())?;
        keyed.push((vec![folded(key, case_sensitive)], item));
    }
    sort_by_keys(state, &mut keyed, false)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (mut key, item) in keyed {
        let key = key.swap_remove(0);
        match groups.last_mut() {
            Some((last, items)) if *last == key => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    // The group is named as its first item spells it.
    groups
        .into_iter()
        .map(|(_, items)| {
            let grouper = at_path(&items[0], &path, default.as_ref())?;
            Ok(Group::value(grouper, items))
        })
        .collect()
}
