//! Operators that the engine has not, or has otherwise than Python.

use super::objects::BoundMethod;
use super::printf::printf;
use super::repr::python_str;
use super::{Result, charge, error, objects, type_name};
use minijinja::value::{Rest, Tuple, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value};
use std::cmp::Ordering;

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_function("_percent", percent);
    environment.add_function("_multiply", multiply);
    environment.add_function("_compare", |state: &State, values: Rest<Value>| {
        compare_chain(state, &values)
    });
    environment.add_function("_concat", |state: &State, values: Rest<Value>| {
        concat(state, &values)
    });
    environment.add_function("_negative", |value: &Value| sign(value, "-"));
    environment.add_function("_positive", |value: &Value| sign(value, "+"));
    environment.add_function("_real", |value: Value| {
        let is_nan = f64::try_from(value.clone()).is_ok_and(f64::is_nan);
        match is_nan && !value.is_integer() {
            true => Err(error("`**`: the power is not a real number")),
            false => Ok(value),
        }
    });
    environment.add_function("_beside", beside);
    environment.add_function("_method", method);
    environment.add_function("_item", |value: &Value, name: &str| -> Result {
        let item = value.get_item(&Value::from(name))?;
        match item.is_undefined() {
            true => method(value, name),
            false => Ok(item),
        }
    });
    environment.add_global("_self", Value::from_object(BoundMethod("self".into())));
    environment.add_function("_sliceable", sliceable);
    environment.add_function("_iterable", iterable);
}

/// A number in the widths that the engine has.
#[derive(Clone, Copy)]
enum Number {
    Integer(i128),
    Float(f64),
}

fn number(value: &Value) -> Option<Number> {
    match value.kind() {
        ValueKind::Bool => Some(Number::Integer(i128::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => {
            i128::try_from(value.clone()).ok().map(Number::Integer)
        }
        ValueKind::Number => f64::try_from(value.clone()).ok().map(Number::Float),
        _ => None,
    }
}

fn unsupported(operator: &str, left: &Value, right: &Value) -> minijinja::Error {
    match (left.is_undefined(), right.is_undefined()) {
        (false, false) => error(format!(
            "`{operator}` is not defined for {} and {}",
            type_name(left),
            type_name(right)
        )),
        _ => undefined(&format!("used with `{operator}`")),
    }
}

fn undefined(how: &str) -> minijinja::Error {
    minijinja::Error::new(
        ErrorKind::UndefinedError,
        format!("an undefined value is {how}"),
    )
}

/// `left % right`: text is formatted, numbers leave a remainder with the sign of the divisor.
pub(super) fn percent(state: &State, left: &Value, right: &Value) -> Result {
    if let Some(format) = left.as_str() {
        let text = printf(state, format, right)?;
        return Ok(Value::from(text));
    }
    match (number(left), number(right)) {
        (Some(Number::Integer(a)), Some(Number::Integer(b))) => {
            let remainder = a
                .checked_rem(b)
                .ok_or_else(|| error("division by zero (`%`)"))?;
            let wrapped = remainder != 0 && (remainder < 0) != (b < 0);
            Ok(Value::from(if wrapped { remainder + b } else { remainder }))
        }
        (Some(a), Some(b)) => {
            let (a, b) = (float(a), float(b));
            if b == 0.0 {
                return Err(error("division by zero (`%`)"));
            }
            let remainder = a % b;
            Ok(Value::from(if remainder == 0.0 {
                0.0_f64.copysign(b)
            } else if (remainder < 0.0) != (b < 0.0) {
                remainder + b
            } else {
                remainder
            }))
        }
        _ => Err(unsupported("%", left, right)),
    }
}

fn float(number: Number) -> f64 {
    match number {
        Number::Integer(value) => value as f64,
        Number::Float(value) => value,
    }
}

/// `left * right`: numbers, or a text or list that is repeated.
fn multiply(state: &State, left: &Value, right: &Value) -> Result {
    let (repeated, count) = match (number(left), number(right)) {
        (Some(Number::Integer(a)), Some(Number::Integer(b))) => {
            return a
                .checked_mul(b)
                .map(Value::from)
                .ok_or_else(|| error(format!("unable to calculate {left} * {right}")));
        }
        (Some(a), Some(b)) => return Ok(Value::from(float(a) * float(b))),
        (None, Some(Number::Integer(count))) => (left, count),
        (Some(Number::Integer(count)), None) => (right, count),
        _ => return Err(unsupported("*", left, right)),
    };
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    if let Some(text) = repeated.as_str() {
        charge(state, text.len().saturating_mul(count))?;
        return Ok(Value::from(text.repeat(count)));
    }
    if repeated.kind() != ValueKind::Seq || objects::type_name(repeated).is_some() {
        return Err(unsupported("*", left, right));
    }
    let items: Vec<Value> = repeated.try_iter()?.collect();
    charge(state, items.len().saturating_mul(count).saturating_mul(64))?;
    let length = items.len() * count;
    let items: Vec<Value> = items.into_iter().cycle().take(length).collect();
    Ok(match repeated.is_tuple() {
        true => Value::from(Tuple::from(items)),
        false => Value::from(items),
    })
}

/// A text beside another in a sum: escaped where the other is.
fn beside(value: Value, other: &Value) -> Value {
    match value.as_str() {
        Some(text) if other.is_safe() && !value.is_safe() => {
            Value::from_safe_string(super::text_filters::escaped(text))
        }
        _ => value,
    }
}

fn sign(value: &Value, operator: &str) -> Result {
    let negative = operator == "-";
    match number(value) {
        Some(Number::Integer(number)) if negative => number
            .checked_neg()
            .map(Value::from)
            .ok_or_else(|| error("an integer too large for `-`")),
        Some(Number::Integer(number)) => Ok(Value::from(number)),
        Some(Number::Float(number)) => Ok(Value::from(if negative { -number } else { number })),
        None if value.is_undefined() => Err(undefined(&format!("used with `{operator}`"))),
        None => Err(error(format!(
            "`{operator}` is not defined for {}",
            type_name(value)
        ))),
    }
}

/// `a ~ b ~ c`: the texts of the values, one after the other.
fn concat(state: &State, values: &[Value]) -> Result {
    let mut text = String::new();
    for value in values {
        let part = python_str(value)?;
        charge(state, text.len() + part.len())?;
        text.push_str(&part);
    }
    Ok(Value::from(text))
}

/// `a < b <= c`: every two neighbours, as far as they hold.
fn compare_chain(state: &State, values: &[Value]) -> Result {
    for at in (0..values.len().saturating_sub(2)).step_by(2) {
        let (left, right) = (&values[at], &values[at + 2]);
        let holds = match values[at + 1].as_str().unwrap_or_default() {
            "==" => left == right,
            "!=" => left != right,
            "in" => contains(state, right, left)?,
            "not in" => !contains(state, right, left)?,
            operator => order_holds(state, operator, left, right)?,
        };
        if !holds {
            return Ok(Value::from(false));
        }
    }
    Ok(Value::from(true))
}

pub(super) fn order_holds(
    state: &State,
    operator: &str,
    left: &Value,
    right: &Value,
) -> Result<bool> {
    let Some(order) =
        compare(state, left, right).map_err(|_| unsupported(operator, left, right))?
    else {
        return Ok(false);
    };
    Ok(match operator {
        "<" => order == Ordering::Less,
        "<=" => order != Ordering::Greater,
        ">" => order == Ordering::Greater,
        _ => order != Ordering::Less,
    })
}

/// The order of two values that Python can order. `None` where one is not a number.
pub(super) fn compare(state: &State, left: &Value, right: &Value) -> Result<Option<Ordering>> {
    compare_nested(state, left, right, 0)
}

fn compare_nested(
    state: &State,
    left: &Value,
    right: &Value,
    depth: usize,
) -> Result<Option<Ordering>> {
    state.consume_fuel(1)?;
    if depth > super::repr::MAX_DEPTH {
        return Err(error("lists nested too deeply to compare"));
    }
    match (number(left), number(right)) {
        (Some(Number::Integer(a)), Some(Number::Integer(b))) => return Ok(Some(a.cmp(&b))),
        (Some(a), Some(b)) => return Ok(float(a).partial_cmp(&float(b))),
        _ => {}
    }
    if let (Some(a), Some(b)) = (left.as_str(), right.as_str()) {
        charge(state, a.len().min(b.len()))?;
        return Ok(Some(a.cmp(b)));
    }
    let lists = left.kind() == ValueKind::Seq
        && right.kind() == ValueKind::Seq
        && type_name(left) == type_name(right);
    if !lists {
        return Err(unsupported("<", left, right));
    }
    let mut others = right.try_iter()?;
    for a in left.try_iter()? {
        let Some(b) = others.next() else {
            return Ok(Some(Ordering::Greater));
        };
        if a != b {
            return compare_nested(state, &a, &b, depth + 1);
        }
    }
    Ok(Some(match others.next() {
        Some(_) => Ordering::Less,
        None => Ordering::Equal,
    }))
}

/// Only what cannot change can be a key.
pub(super) fn hashable(value: &Value) -> Result<()> {
    let changes = match value.kind() {
        ValueKind::Map => true,
        ValueKind::Seq => !value.is_tuple() && objects::type_name(value).is_none(),
        _ => false,
    };
    match changes {
        true => Err(error(format!("{} cannot be a key", type_name(value)))),
        false => Ok(()),
    }
}

/// `value in container`.
pub(super) fn contains(state: &State, container: &Value, value: &Value) -> Result<bool> {
    match container.kind() {
        ValueKind::Undefined => Ok(false),
        ValueKind::String => {
            let text = container.as_str().unwrap_or_default();
            charge(state, text.len())?;
            match value.as_str() {
                Some(part) => Ok(text.contains(part)),
                None => Err(error(format!(
                    "`in` a text needs a text on its left, not {}",
                    type_name(value)
                ))),
            }
        }
        ValueKind::Map => {
            hashable(value)?;
            let object = container.as_object();
            Ok(object.is_some_and(|object| object.get_value(value).is_some()))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            for item in container.try_iter()? {
                state.consume_fuel(1)?;
                if item == *value {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        _ => Err(error(format!(
            "`in`: {} is not iterable",
            type_name(container)
        ))),
    }
}

/// `value.name` of a name that is a method of Python's strings, lists or mappings, or a macro's `arguments`.
fn method(value: &Value, name: &str) -> Result {
    let methods: &[&str] = match value.kind() {
        ValueKind::Undefined => {
            return Err(undefined(&format!("asked for `.{name}`")));
        }
        ValueKind::String => super::strings::METHODS,
        ValueKind::Map if !is_engine_map(value) => super::methods::OF_MAPPINGS,
        ValueKind::Seq if value.is_tuple() => super::methods::OF_TUPLES,
        ValueKind::Seq if objects::type_name(value).is_none() => super::methods::OF_LISTS,
        _ => &[],
    };
    // Methods that change a value are hidden from templates.
    if methods.contains(&name) && !super::methods::CHANGING.contains(&name) {
        return Ok(Value::from_object(BoundMethod(name.to_owned())));
    }
    let attribute = match value.kind() {
        ValueKind::Map | ValueKind::Plain | ValueKind::Seq => value.get_attr(name)?,
        _ => return Ok(Value::UNDEFINED),
    };
    Ok(match name == "arguments" && objects::is_macro(value) {
        true => Value::from(Tuple::new(attribute.try_iter()?.collect())),
        false => attribute,
    })
}

/// Namespaces, loops and macros, which are no mappings.
fn is_engine_map(value: &Value) -> bool {
    let name = value.as_object().map_or("", |object| object.type_name());
    ["Namespace", "Loop", "Macro"]
        .iter()
        .any(|part| name.contains(part))
}

/// What can be sliced.
fn sliceable(value: Value) -> Result {
    match value.kind() {
        ValueKind::Undefined => Err(undefined("sliced")),
        ValueKind::String | ValueKind::Seq => match objects::type_name(&value) {
            Some(name) => Err(error(format!("a slice of a {name}: add `| list`"))),
            None => Ok(value),
        },
        ValueKind::Iterable if objects::type_name(&value).is_none() => Ok(value),
        _ => Err(error(format!("{} cannot be sliced", type_name(&value)))),
    }
}

/// What can be walked.
fn iterable(value: Value) -> Result {
    match value.kind() {
        ValueKind::None | ValueKind::Number | ValueKind::Bool => {
            Err(error(format!("{} is not iterable", type_name(&value))))
        }
        _ => Ok(value),
    }
}
