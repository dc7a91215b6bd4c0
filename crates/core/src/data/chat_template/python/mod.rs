//! Python's values, for templates: how they are written, their operators and methods, and Jinja's
//! filters, tests and functions over them.
//!
//! Where Python raises, so does this; what it cannot do as Python does is an error that names it.

mod filters;
mod format;
mod functions;
mod methods;
mod number_filters;
mod objects;
mod operators;
mod printf;
mod repr;
mod selection;
mod strings;
mod tables;
mod tests_of_values;
mod text_filters;
mod text_search;

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use methods::call_method;
pub(super) use objects::{held_items, is_plain_iterable};
pub(super) use repr::python_float;
use repr::python_str;

type Result<T = Value> = std::result::Result<T, Error>;

/// A filter: the value, and what else it is given.
type Filter = fn(&mut State, &Value, &[Value]) -> Result;

/// Adds all of it to an environment, and takes away what Jinja does not have.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, state, value| {
        let text = python_str(value)?;
        let escaped = matches!(state.auto_escape(), minijinja::AutoEscape::Html);
        match escaped && !value.is_safe() {
            true => out.write_str(&text_filters::escaped(&text)),
            false => out.write_str(&text),
        }
        .map_err(Error::from)
    });
    environment.set_unknown_method_callback(call_method);
    filters::install(environment);
    number_filters::install(environment);
    selection::install(environment);
    text_filters::install(environment);
    tests_of_values::install(environment);
    functions::install(environment);
    operators::install(environment);
}

fn add_filters(environment: &mut Environment<'static>, filters: &[(&'static str, Filter)]) {
    use minijinja::value::{Rest, ValueOrKwargs};
    for &(name, filter) in filters {
        environment.add_filter(
            name,
            move |state: &mut State, value: &Value, args: Rest<ValueOrKwargs>| {
                filter(state, value, &args.into_values())
            },
        );
    }
}

fn error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The arguments of a call by the names of its parameters, as Python binds them.
pub(super) fn bind<const N: usize>(
    function: &str,
    parameters: [&str; N],
    args: &[Value],
) -> Result<[Option<Value>; N]> {
    let (positional, keywords) = match args.split_last() {
        Some((last, rest)) if last.is_kwargs() => {
            let (keywords,): (Kwargs,) = from_args(std::slice::from_ref(last))?;
            (rest, Some(keywords))
        }
        _ => (args, None),
    };
    if positional.len() > N {
        return Err(error(format!(
            "{function} takes at most {N} arguments, not {}",
            positional.len()
        )));
    }
    let mut bound: [Option<Value>; N] = std::array::from_fn(|i| positional.get(i).cloned());
    for name in keywords.iter().flat_map(Kwargs::args) {
        let at = parameters.iter().position(|parameter| *parameter == name);
        let value: Option<Value> = keywords.as_ref().and_then(|k| k.peek(name).ok());
        match at {
            Some(at) if bound[at].is_none() => bound[at] = value,
            Some(_) => return Err(error(format!("{function} has two values for `{name}`"))),
            None => return Err(error(format!("{function} has no parameter `{name}`"))),
        }
    }
    Ok(bound)
}

/// An argument that must be there.
fn required(function: &str, parameter: &str, value: Option<Value>) -> Result {
    value.ok_or_else(|| error(format!("{function} needs `{parameter}`")))
}

/// An argument as text; nothing and `none` are the default.
fn text_or<'a>(function: &str, value: &'a Option<Value>, default: &'a str) -> Result<&'a str> {
    match value {
        None => Ok(default),
        Some(value) => value
            .as_str()
            .ok_or_else(|| error(format!("{function} takes text, not {}", type_name(value)))),
    }
}

/// An argument as an integer.
fn integer_or(function: &str, value: &Option<Value>, default: i64) -> Result<i64> {
    match value {
        None => Ok(default),
        Some(value) => integer(function, value),
    }
}

fn integer(function: &str, value: &Value) -> Result<i64> {
    if value.kind() == ValueKind::Bool {
        return Ok(i64::from(value.is_true()));
    }
    value
        .as_i64()
        .filter(|_| value.is_integer())
        .ok_or_else(|| {
            error(format!(
                "{function} takes an integer, not {}",
                type_name(value)
            ))
        })
}

fn flag_or(value: &Option<Value>, default: bool) -> bool {
    value.as_ref().map_or(default, Value::is_true)
}

/// Whether a name is a method of Python's strings, lists or mappings: without a call, `x.items` is the
/// method, not the item of this name.
pub(super) fn is_method(name: &str) -> bool {
    [strings::METHODS, methods::OF_MAPPINGS, methods::OF_LISTS]
        .iter()
        .any(|methods| methods.contains(&name))
}

/// What Python calls the type of a value.
fn type_name(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "undefined",
        ValueKind::None => "None",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Seq if value.is_tuple() => "tuple",
        ValueKind::Map => "dict",
        ValueKind::Seq => objects::type_name(value).unwrap_or("list"),
        ValueKind::Iterable => objects::type_name(value).unwrap_or("list"),
        _ => objects::type_name(value).unwrap_or("object"),
    }
}

/// The items of a value; an undefined one has none.
fn items(state: &State, value: &Value) -> Result<Vec<Value>> {
    if value.is_none() || value.is_number() {
        return Err(error(format!("{} is not iterable", type_name(value))));
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        items.push(item);
    }
    Ok(items)
}

/// Pays for text before it is made.
fn charge(state: &State, bytes: usize) -> Result<()> {
    state.consume_fuel(bytes as u64 / 64)
}
