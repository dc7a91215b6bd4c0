//! Jinja's filters of lists and mappings.

use super::objects::Generator;
use super::operators::compare;
use super::repr::{python_repr, python_str};
use super::{
    Filter, Result, add_filters, bind, error, flag_or, integer, items, required, text_or, type_name,
};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, State, Value};
use std::cmp::Ordering;

const FILTERS: &[(&str, Filter)] = &[
    ("attr", attr),
    ("batch", batch),
    ("default", default),
    ("d", default),
    ("dictsort", dict_sort),
    ("items", pairs),
    ("join", join),
    ("last", last),
    ("length", length),
    ("count", length),
    ("list", list),
    ("max", max),
    ("min", min),
    ("pprint", pprint),
    ("reverse", reverse),
    ("slice", slice),
    ("sort", sort),
    ("string", string),
];

/// Filters of the engine that Jinja does not have.
const FOREIGN: [&str; 5] = ["bool", "chain", "lines", "split", "zip"];

pub(super) fn install(environment: &mut Environment<'static>) {
    for name in FOREIGN {
        environment.remove_filter(name);
    }
    add_filters(environment, FILTERS);
}

/// Sorts by keys that Python can order.
pub(super) fn sort_by_keys(
    state: &State,
    keyed: &mut [(Vec<Value>, Value)],
    descending: bool,
) -> Result<()> {
    let mut failure = None;
    keyed.sort_by(|a, b| {
        for (a, b) in a.0.iter().zip(&b.0) {
            match compare(state, a, b) {
                Ok(Some(Ordering::Equal) | None) => {}
                Ok(Some(order)) => return if descending { order.reverse() } else { order },
                Err(e) => {
                    failure.get_or_insert(e);
                    return Ordering::Equal;
                }
            }
        }
        Ordering::Equal
    });
    failure.map_or(Ok(()), Err)
}

/// A key without regard to case, unless it matters.
pub(super) fn folded(value: Value, case_sensitive: bool) -> Value {
    match value.as_str() {
        Some(text) if !case_sensitive => Value::from(text.to_lowercase()),
        _ => value,
    }
}

/// `value[part]`, and what is missing is undefined.
fn part_of(value: &Value, part: &Value) -> Result {
    match value.kind() {
        ValueKind::Undefined => Err(error(format!(
            "an undefined value has no attribute `{part}`"
        ))),
        ValueKind::Map
        | ValueKind::Seq
        | ValueKind::String
        | ValueKind::Iterable
        | ValueKind::Plain => value.get_item(part),
        _ => Ok(Value::UNDEFINED),
    }
}

/// The value at a path such as `a.b.0`, or at a number.
pub(super) fn at_path(value: &Value, path: &Value, default: Option<&Value>) -> Result {
    let Some(text) = path.as_str() else {
        return part_of(value, path);
    };
    let mut value = value.clone();
    for part in text.split('.') {
        let part = part
            .parse::<usize>()
            .map_or_else(|_| Value::from(part), Value::from);
        value = part_of(&value, &part)?;
        if let (true, Some(default)) = (value.is_undefined(), default) {
            value = default.clone();
        }
    }
    Ok(value)
}

fn attr(_: &mut State, value: &Value, args: &[Value]) -> Result {
    let [name] = bind("attr", ["name"], args)?;
    let name = required("attr", "name", name)?;
    // Items of a mapping are no attributes, and of Python's attributes templates need none.
    let methods = super::strings::METHODS.contains(&name.as_str().unwrap_or_default());
    match value.kind() {
        ValueKind::String if methods => Err(error("`attr` of a method: call the method")),
        ValueKind::Map
            if value
                .as_object()
                .is_some_and(|o| o.type_name().contains("Namespace")) =>
        {
            value.get_item(&name)
        }
        _ => Ok(Value::UNDEFINED),
    }
}

fn batch(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let [size, fill] = bind("batch", ["linecount", "fill_with"], args)?;
    let size = integer("batch", &required("batch", "linecount", size)?)?;
    let size = usize::try_from(size).unwrap_or(0).max(1);
    let rows = items(state, value)?;
    let mut rows: Vec<Vec<Value>> = rows.chunks(size).map(<[Value]>::to_vec).collect();
    if let (Some(fill), Some(last)) = (fill.filter(|fill| !fill.is_none()), rows.last_mut()) {
        state.consume_fuel(size as u64)?;
        last.resize(size, fill);
    }
    Ok(Generator::value(
        rows.into_iter().map(Value::from).collect(),
    ))
}

fn slice(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let [count, fill] = bind("slice", ["slices", "fill_with"], args)?;
    let count = integer("slice", &required("slice", "slices", count)?)?;
    let count = usize::try_from(count).ok().filter(|count| *count > 0);
    let count = count.ok_or_else(|| error("`slice` takes a number of slices above zero"))?;
    state.consume_fuel(count as u64)?;
    let items = items(state, value)?;
    let (size, longer) = (items.len() / count, items.len() % count);
    let fill = fill.filter(|fill| !fill.is_none());
    let mut rest = items.as_slice();
    let mut rows = Vec::with_capacity(count);
    for i in 0..count {
        let (row, after) = rest.split_at(size + usize::from(i < longer));
        rest = after;
        let mut row = row.to_vec();
        if i >= longer {
            row.extend(fill.clone());
        }
        rows.push(Value::from(row));
    }
    Ok(Generator::value(rows))
}

fn default(_: &mut State, value: &Value, args: &[Value]) -> Result {
    let [default, boolean] = bind("default", ["default_value", "boolean"], args)?;
    let missing = value.is_undefined() || (flag_or(&boolean, false) && !value.is_true());
    Ok(match missing {
        true => default.unwrap_or_else(|| Value::from("")),
        false => value.clone(),
    })
}

fn dict_sort(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let parameters = ["case_sensitive", "by", "reverse"];
    let [case_sensitive, by, reverse] = bind("dictsort", parameters, args)?;
    if value.kind() != ValueKind::Map {
        return Err(error(format!(
            "`dictsort` takes a mapping, not {}",
            type_name(value)
        )));
    }
    let case_sensitive = flag_or(&case_sensitive, false);
    let by_value = match text_or("dictsort", &by, "key")? {
        "key" => false,
        "value" => true,
        other => {
            return Err(error(format!(
                "`dictsort` by `key` or `value`, not `{other}`"
            )));
        }
    };
    let mut keyed = Vec::new();
    for key in items(state, value)? {
        let item = value.get_item(&key)?;
        let by = if by_value { item.clone() } else { key.clone() };
        let pair = Value::from(Tuple::from([key, item]));
        keyed.push((vec![folded(by, case_sensitive)], pair));
    }
    sort_by_keys(state, &mut keyed, flag_or(&reverse, false))?;
    Ok(keyed.into_iter().map(|(_, pair)| pair).collect())
}

fn pairs(state: &mut State, value: &Value, _: &[Value]) -> Result {
    match value.kind() {
        ValueKind::Undefined => Ok(Generator::value(Vec::new())),
        ValueKind::Map => {
            let mut pairs = Vec::new();
            for key in items(state, value)? {
                let item = value.get_item(&key)?;
                pairs.push(Value::from(Tuple::from([key, item])));
            }
            Ok(Generator::value(pairs))
        }
        _ => Err(error(format!(
            "`items` takes a mapping, not {}",
            type_name(value)
        ))),
    }
}

fn join(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let [separator, attribute] = bind("join", ["d", "attribute"], args)?;
    let separator = separator.map_or_else(|| Ok(String::new()), |value| python_str(&value))?;
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let mut out = String::new();
    for (i, item) in items(state, value)?.iter().enumerate() {
        let text = match &attribute {
            Some(path) => python_str(&at_path(item, path, None)?)?,
            None => python_str(item)?,
        };
        super::charge(state, separator.len() + text.len())?;
        if i > 0 {
            out.push_str(&separator);
        }
        out.push_str(&text);
    }
    Ok(Value::from(out))
}

fn is_generator(value: &Value) -> bool {
    value.downcast_object_ref::<Generator>().is_some()
}

fn last(state: &mut State, value: &Value, _: &[Value]) -> Result {
    if is_generator(value) {
        return Err(error(format!(
            "`last` of a {}: add `| list`",
            type_name(value)
        )));
    }
    Ok(items(state, value)?.pop().unwrap_or_default())
}

fn length(_: &mut State, value: &Value, _: &[Value]) -> Result {
    if value.is_undefined() {
        return Ok(Value::from(0));
    }
    value
        .len()
        .map(Value::from)
        .ok_or_else(|| error(format!("`length` of {}", type_name(value))))
}

fn list(state: &mut State, value: &Value, _: &[Value]) -> Result {
    Ok(Value::from(items(state, value)?))
}

fn extreme(state: &State, value: &Value, args: &[Value], wanted: Ordering) -> Result {
    let name = if wanted == Ordering::Less {
        "min"
    } else {
        "max"
    };
    let [case_sensitive, attribute] = bind(name, ["case_sensitive", "attribute"], args)?;
    let case_sensitive = flag_or(&case_sensitive, false);
    let mut best: Option<(Value, Value)> = None;
    for item in items(state, value)? {
        let key = match &attribute {
            Some(path) => at_path(&item, path, None)?,
            None => item.clone(),
        };
        let key = folded(key, case_sensitive);
        let better = match &best {
            Some((other, _)) => compare(state, &key, other)? == Some(wanted),
            None => true,
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(best.map_or(Value::UNDEFINED, |(_, item)| item))
}

fn max(state: &mut State, value: &Value, args: &[Value]) -> Result {
    extreme(state, value, args, Ordering::Greater)
}

fn min(state: &mut State, value: &Value, args: &[Value]) -> Result {
    extreme(state, value, args, Ordering::Less)
}

/// `pprint.pformat`: keys in order; what is longer than a line is not laid out.
fn pprint(state: &mut State, value: &Value, _: &[Value]) -> Result {
    let text = python_repr(&sorted_maps(state, value, 0)?)?;
    match text.chars().count() > 80 {
        true => Err(error(
            "`pprint` of what does not fit in 80 columns: use `tojson(indent=2)`",
        )),
        false => Ok(Value::from(text)),
    }
}

fn sorted_maps(state: &State, value: &Value, depth: usize) -> Result {
    if depth > 100 {
        return Err(error("`pprint` of a value nested too deeply"));
    }
    match value.kind() {
        ValueKind::Map => {
            let mut keyed: Vec<(Vec<Value>, Value)> = items(state, value)?
                .into_iter()
                .map(|key| (vec![key.clone()], key))
                .collect();
            sort_by_keys(state, &mut keyed, false)?;
            let pairs: Result<Vec<(Value, Value)>> = keyed
                .into_iter()
                .map(|(_, key)| {
                    let item = value.get_item(&key)?;
                    Ok((key, sorted_maps(state, &item, depth + 1)?))
                })
                .collect();
            Ok(Value::from_pairs(pairs?))
        }
        ValueKind::Seq if type_name(value) == "list" => {
            let items: Result<Vec<Value>> = items(state, value)?
                .iter()
                .map(|item| sorted_maps(state, item, depth + 1))
                .collect();
            Ok(Value::from(items?))
        }
        _ => Ok(value.clone()),
    }
}

fn reverse(state: &mut State, value: &Value, _: &[Value]) -> Result {
    if let Some(text) = value.as_str() {
        return Ok(Value::from(text.chars().rev().collect::<String>()));
    }
    if is_generator(value) {
        let mut items = items(state, value)?;
        items.reverse();
        return Ok(Value::from(items));
    }
    let name = match type_name(value) {
        "dict" => "dict_reversekeyiterator",
        "list" => "list_reverseiterator",
        _ => "reversed",
    };
    let mut items = items(state, value)?;
    items.reverse();
    Ok(Generator::named(name, items))
}

fn sort(state: &mut State, value: &Value, args: &[Value]) -> Result {
    let parameters = ["reverse", "case_sensitive", "attribute"];
    let [reverse, case_sensitive, attribute] = bind("sort", parameters, args)?;
    let case_sensitive = flag_or(&case_sensitive, false);
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let paths: Vec<Value> = match &attribute {
        Some(path) => match path.as_str() {
            Some(text) => text.split(',').map(Value::from).collect(),
            None => vec![path.clone()],
        },
        None => Vec::new(),
    };
    let mut keyed = Vec::new();
    for item in items(state, value)? {
        let keys = match paths.as_slice() {
            [] => vec![folded(item.clone(), case_sensitive)],
            paths => paths
                .iter()
                .map(|path| Ok(folded(at_path(&item, path, None)?, case_sensitive)))
                .collect::<Result<Vec<Value>>>()?,
        };
        keyed.push((keys, item));
    }
    sort_by_keys(state, &mut keyed, flag_or(&reverse, false))?;
    Ok(keyed.into_iter().map(|(_, item)| item).collect())
}

fn string(_: &mut State, value: &Value, _: &[Value]) -> Result {
    match value.kind() {
        ValueKind::String => Ok(value.clone()),
        _ => python_str(value).map(Value::from),
    }
}
